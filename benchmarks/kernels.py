"""Times the kernels on a GPU, each beside the other ways to do the same.

Run it as `python -m benchmarks.kernels`. Needs jax and NumPy only.
"""

import functools
import sys
from collections.abc import Iterable, Iterator

from benchmarks import attention_cases, lora_cases, lora_summary, merge_cases
from benchmarks.attention_cases import Attention
from benchmarks.gpu import Options, Program, Recorder, require_gpu, run_group
from benchmarks.lora_cases import Batches
from benchmarks.lora_inputs import Point, Pools
from pallas_kernels.tuning.shapes import MODELS, LinearShape

GOALS = (
    Point(tokens=8, ranks=(64,) * 8),
    Point(tokens=32, ranks=(64,) * 32),
    Point(tokens=4096, ranks=(64,) * 8),
)
# 32 adapters whose ranks add up differently: time should follow the sum.
MIXED = tuple(
    Point(tokens=32, ranks=ranks * (32 // len(ranks)))
    for ranks in ((8,), (16,), (32,), (8, 16, 32, 64), (16, 64))
)
SWEEP_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
SWEEP_ADAPTERS, SWEEP_RANKS = (1, 8, 32), (8, 64, 128)
ATTENTION = tuple(
    Attention(model=model, requests=requests, tokens=tokens, kv_tokens=kv_tokens)
    for model, requests, tokens, kv_tokens in (
        ("llava-1.5-7b", 8, 1, 800),
        ("llava-1.5-7b", 32, 1, 800),
        ("llava-1.5-7b", 1, 640, 640),
        ("llava-1.5-7b", 1, 1, 800),
        ("llava-1.5-7b", 8, 1, 4000),
        ("llava-1.5-7b", 4, 1024, 1024),
        ("llava-1.5-7b", 1, 512, 2048),
        ("llava-1.5-13b", 8, 1, 800),
        ("llava-1.5-13b", 32, 1, 800),
        ("qwen2.5-vl-7b", 8, 1, 800),
        ("qwen2.5-vl-7b", 32, 1, 800),
        ("qwen2.5-vl-7b", 1, 640, 640),
    )
)
QUICK_ATTENTION = 3


def sweep(*, quick: bool) -> list[Point]:
    """The square product's points beside the goals, fewest tokens first, each once."""
    points = [*MIXED]
    if not quick:
        points += [
            Point(tokens=tokens, ranks=(rank,) * adapters)
            for tokens in SWEEP_TOKENS
            for adapters in SWEEP_ADAPTERS
            for rank in SWEEP_RANKS
            if adapters <= tokens
        ]
    unique = dict.fromkeys(point for point in points if point not in GOALS)
    return sorted(unique, key=lambda point: point.tokens)


def lora_groups(
    linear: LinearShape,
    points: Iterable[Point],
    *,
    name: str,
    model: str,
    pools: Pools | None = None,
) -> Iterator[Iterable[Program]]:
    """One group a number of tokens."""
    pools, by_tokens = pools or Pools(linear), {}
    weights = functools.cache(functools.partial(lora_cases.weights, linear))
    for point in points:
        by_tokens.setdefault(point.tokens, []).append(point)
    for tokens, own in by_tokens.items():
        batches = Batches(linear, tokens, weights=weights)
        yield lora_cases.programs(pools, batches, own, name=name, model=model)


def groups(options: Options) -> Iterator[Iterable[Program]]:
    """Goals first, so that a short run has them."""
    for case in ATTENTION[: QUICK_ATTENTION if options.quick else None]:
        yield attention_cases.programs(case)
    yield merge_cases.programs("llava-1.5-7b")
    square = MODELS["llava-1.5-7b"].linears["o"]
    of_square = functools.partial(lora_groups, square, model="llava-1.5-7b", pools=Pools(square))
    for points in (GOALS, sweep(quick=options.quick)):
        yield from of_square(points, name="lora/4096-4096")
    if options.quick:
        return
    # Qwen-VL's linears are LLaVA-1.5's.
    for model in ("llava-1.5-7b", "llava-1.5-13b", "qwen2.5-vl-7b"):
        for name, linear in MODELS[model].linears.items():
            if linear != square:
                name = f"lora/{model}/{name}"
                yield from lora_groups(linear, GOALS, name=name, model=model)


def main(arguments: list[str]) -> None:
    options = Options.parse(__doc__, arguments)
    require_gpu("kernels")
    recorder = Recorder("kernels")
    for group in groups(options):
        run_group((program for program in group if options.wants(program.name)), recorder)
    print(*lora_summary.lines(recorder.records), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
