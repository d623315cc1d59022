"""Steps of paged attention for tests: random inputs, and what must come out by the reference."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import paged_attention as op
from pallas_kernels.paged_attention import reference

LAYERS, LAYER, W = 2, 1, 8

# Both sides accumulate in float32 or better; the order of the sums differs.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows are (cached, new) tokens: one new token is a decode row, more are a chunk."""

    N: int
    K: int
    H: int
    page_tokens: int
    rows: list[tuple[int, int]]


# The smallest kernels take heads of 16 and pages of 16; "xla" takes any.
CASES = {
    "one_decode": Case(4, 4, 16, 16, [(20, 1)]),
    "decodes_of_many_lengths": Case(4, 2, 16, 16, [(0, 1), (63, 1), (64, 1), (100, 1)]),
    "one_prompt": Case(4, 4, 16, 16, [(0, 37)]),
    "prompt_longer_than_a_block": Case(2, 1, 16, 16, [(0, 100)]),
    "continued_chunk": Case(4, 2, 16, 32, [(50, 30)]),
    "prefix_hit_of_one_page": Case(4, 2, 16, 16, [(16, 5)]),
    "mixed_step": Case(6, 2, 16, 16, [(70, 1), (3, 1), (0, 20), (64, 9), (10, 66)]),
    "five_heads": Case(5, 5, 16, 16, [(9, 1), (0, 12)]),
    "pages_of_a_tile": Case(9, 3, 64, 64, [(130, 1), (100, 70)]),
    "pages_of_two_tiles": Case(2, 2, 32, 128, [(200, 1), (129, 40)]),
    "seven_heads_share_one": Case(14, 2, 16, 16, [(40, 1), (7, 20)]),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """Arguments of `op.attend`, and its results by the reference.

    Attributes:
      inputs: positional arguments.
      keywords: keyword arguments, but for the implementation.
      want_TNH: float64; NaN in rows of padding tokens, which are unspecified.
      want_kv: keys and values of the whole cache, float64.
    """

    inputs: tuple
    keywords: dict
    want_TNH: np.ndarray
    want_kv: tuple[np.ndarray, np.ndarray]

    def check(self, got_TNH, kv: op.KVPages, tolerance=FLOAT32):
        """Asserts the outputs, and that nothing but the new tokens changed in the cache."""
        got_TNH = np.float64(got_TNH)
        used_T = ~np.isnan(self.want_TNH[:, 0, 0])
        np.testing.assert_allclose(got_TNH[used_T], self.want_TNH[used_T], **tolerance)
        assert np.isfinite(got_TNH).all(), "rows of padding tokens"
        pages = len(kv.k_PKpH) // LAYERS
        scratch = pages * LAYER
        for got, want in zip((kv.k_PKpH, kv.v_PKpH), self.want_kv, strict=True):
            got = np.delete(np.float64(got), scratch, 0)
            np.testing.assert_allclose(got, np.delete(want, scratch, 0), **tolerance)


def build(
    case: Case, *, unwritten: float, dtype=np.float32, cache_dtype=None, spare_tokens: int = 3
) -> Step:
    """A step of `LAYER` whose cache holds `unwritten` wherever no token was written yet."""
    N, K, H, p, rows = dataclasses.astuple(case)
    rng = np.random.default_rng(0)

    def normal(*shape, of=dtype):
        return rng.standard_normal(shape, np.float32).astype(of)

    cache_dtype = cache_dtype or dtype
    T = sum(new for _, new in rows) + spare_tokens
    qkv_TE, angle_Th = normal(T, (N + 2 * K) * H), rng.uniform(0, 99, (T, H // 2)).astype("f4")
    q_TNH, k_TKH, v_TKH = np.split(qkv_TE.reshape(T, -1, H), (N, N + K), axis=1)
    # Rounded where the implementations round: to the dtype of the step, then of the cache.
    q_TNH, k_TKH = (reference.rotate(x, angle_Th).astype(dtype) for x in (q_TNH, k_TKH))
    pages = len(rows) * W + 1
    table = 1 + rng.permutation(pages - 1).reshape(len(rows), W)
    cache = [np.full((LAYERS * pages, K, p, H), unwritten, cache_dtype) for _ in range(2)]
    before, want_TNH = [], np.full((T, N, H), np.nan)
    page_T, offset_T = np.zeros((2, T), np.int32)
    starts, t = [], 0
    for b, (cached, _) in enumerate(rows):
        at = LAYER * pages + table[b, np.arange(cached) // p], slice(None), np.arange(cached) % p
        for pages_PKpH in cache:
            pages_PKpH[at] = normal(cached, K, H, of=cache_dtype)
    before = [jnp.asarray(x) for x in cache]
    for b, (cached, new) in enumerate(rows):
        position, here = cached + np.arange(new), slice(t, t + new)
        page_T[here], offset_T[here] = table[b, position // p], position % p
        for pages_PKpH, x_TKH in zip(cache, (k_TKH, v_TKH), strict=True):
            pages_PKpH[LAYER * pages + page_T[here], :, offset_T[here]] = x_TKH[here]
        seen = np.arange(cached + new)
        at = LAYER * pages + table[b, seen // p], slice(None), seen % p
        k_SKH, v_SKH = (pages_PKpH[at].astype(dtype) for pages_PKpH in cache)
        want_TNH[here] = reference.attend(q_TNH[here], k_SKH, v_SKH)
        starts.append(t)
        t += new
    decodes, chunks = _lay_out(case, table, starts)
    return Step(
        inputs=(
            jnp.asarray(qkv_TE),
            jnp.asarray(angle_Th),
            op.KVPages(k_PKpH=before[0], v_PKpH=before[1]),
        ),
        keywords=dict(
            page_T=jnp.asarray(page_T),
            offset_T=jnp.asarray(offset_T),
            decodes=decodes,
            chunks=chunks,
            layer_page=LAYER * pages,
        ),
        want_TNH=want_TNH,
        want_kv=(np.float64(cache[0]), np.float64(cache[1])),
    )


def _lay_out(case: Case, table, starts) -> tuple[op.Decodes, op.Chunks | None]:
    rows = case.rows
    decode = [b for b, (_, new) in enumerate(rows) if new == 1]
    chunk = [b for b, (_, new) in enumerate(rows) if new > 1]
    assert decode == list(range(len(decode))), "decode rows come first"
    pad = 2  # unused rows must change nothing
    kv_len = [sum(rows[b]) for b in decode] + [0] * pad
    decodes = op.Decodes(
        kv_len_D=jnp.asarray(kv_len, jnp.int32),
        page_DW=jnp.asarray(np.concatenate([table[decode], np.zeros((pad, W), int)]), jnp.int32),
        count=jnp.int32(len(decode)),
    )
    if not chunk:
        return decodes, None
    columns = [(starts[b], rows[b][1], sum(rows[b])) for b in chunk] + [(0, 0, 0)] * pad
    start_C, len_C, kv_len_C = (jnp.asarray(x, jnp.int32) for x in zip(*columns, strict=True))
    chunks = op.Chunks(
        start_C=start_C,
        len_C=len_C,
        kv_len_C=kv_len_C,
        page_CW=jnp.asarray(np.concatenate([table[chunk], np.zeros((pad, W), int)]), jnp.int32),
        count=jnp.int32(len(chunk)),
    )
    return decodes, chunks


BFLOAT16 = ml_dtypes.bfloat16
