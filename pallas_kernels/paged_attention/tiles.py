"""Static shapes of the Triton kernels' blocks, and their choice by the shape of the work."""

import dataclasses

STEP_TOKENS = 64  # keys a loop step: 16 KB each of keys and values at 128 bfloat16
PROGRAMS = 264  # two a multiprocessor of an H100, which keep 128 KB a multiprocessor on the way
MIN_STEPS = 2  # a split shorter than this costs more to merge than it saves
MAX_SPLITS = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTile:
    """A program of decode attention: one row, one key-value head, one split of the keys.

    Attributes:
      step_tokens: keys a loop step, a power of two.
      splits: programs among which a row's keys are divided; over 1 a merge follows.
      warps: of a program.
      stages: of the loop's pipeline; one step less of keys and values is on its way.
    """

    step_tokens: int
    splits: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTile:
    """A program of prompt attention: one block of a chunk's tokens, one key-value head.

    Attributes:
      rows: query rows, a power of two; tokens times the query heads of a key-value head.
      step_tokens: keys a loop step, a power of two.
      warps: of a program; wgmma wants 64 rows for every four.
      stages: of the loop's pipeline.
    """

    rows: int
    step_tokens: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionTiles:
    """The tiles of a step; hashable, fixed when a step is traced."""

    decode: DecodeTile
    chunk: ChunkTile


def attention_tiles(
    *,
    tokens: int,
    decodes: int,
    heads: int,
    kv_heads: int,
    request_tokens: int,
    itemsize: int,
) -> AttentionTiles:
    """Chooses tiles for a step.

    Args:
      tokens: of the step.
      decodes: rows with one token.
      heads: query heads.
      kv_heads: key-value heads.
      request_tokens: tokens that a row of the page table holds.
      itemsize: bytes a component, in the wider of cache and arithmetic.
    """
    splits = round(PROGRAMS / max(1, decodes * kv_heads))
    longest = -(-request_tokens // (MIN_STEPS * STEP_TOKENS))
    # float32 is multiplied exactly, without matrix instructions: larger blocks would spill.
    wide, group = itemsize > 2, heads // kv_heads
    # Twice as many rows halve what is read of the keys, where enough programs remain.
    rows = 128 if tokens * heads >= 128 * PROGRAMS else 64
    return AttentionTiles(
        decode=DecodeTile(
            step_tokens=STEP_TOKENS // 2 if wide else STEP_TOKENS,
            splits=max(1, min(splits, longest, MAX_SPLITS)),
            warps=4,
            stages=3,
        ),
        chunk=ChunkTile(
            rows=max(32 if wide else rows, _power_of_two(group)),
            step_tokens=STEP_TOKENS,
            warps=8 if wide or rows == 128 else 4,
            stages=2 if wide else 3,
        ),
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
