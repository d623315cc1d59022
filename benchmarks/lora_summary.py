"""What records say about LoRA: ours against the rivals, and against the sum of ranks.

Each run of `benchmarks.kernels` ends with it. `python -m benchmarks.lora_summary FILE` prints it
for the newest records of a file, which several runs may have written.
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

OURS = ("triton", "two-launches")  # in one launch for few rows, and in two for any; no rivals
LEAST_MS = 2e-4  # added times below it are noise: differences of two medians
# Of a time, the host's share above which the device has waited for it.
HOST_BOUND = 0.8


def lines(records: Iterable[Record]) -> list[str]:
    """Geometric means and the worst point of the added times; nothing without any."""
    points: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if "added_ms" in record:
            points[record["name"].rsplit("/", 1)[0]][record["impl"]] = record
    # Products of several linears have no rivals.
    rivalled = {n: of for n, of in points.items() if "triton" in of and "masked-dense" in of}
    if not rivalled:
        return []
    found = [_against_the_best("ours to the best rival", rivalled)]
    of_device = {name: of for name, of in rivalled.items() if not _waits_for_host(of)}
    if 0 < len(of_device) < len(rivalled):
        found.append(_against_the_best("where the host is not what counts", of_device))
    for impl in ("fixed-tile", "masked-dense", "loop", "gather-bmm"):
        of_impl = [of for of in rivalled.values() if impl in of]
        if of_impl:
            times = [_added(of, impl) / _added(of, "triton") for of in of_impl]
            found.append(f"{impl} to ours: {statistics.geometric_mean(times):.2f}")
    return found + _by_rank_sum([of["triton"] for of in rivalled.values()])


def _against_the_best(what: str, points: Mapping[str, Mapping[str, Record]]) -> str:
    ratios = {
        name: _added(of, "triton") / _added(of, _best_rival(of)) for name, of in points.items()
    }
    worst = max(ratios, key=ratios.__getitem__)
    mean, above = statistics.geometric_mean(ratios.values()), sum(r > 1.1 for r in ratios.values())
    return (
        f"{what}, {len(ratios)} points: {mean:.2f} in geometric mean, "
        f"{above} above 1.1, the worst {ratios[worst]:.2f} ({worst})"
    )


def _by_rank_sum(ours: Sequence[Record]) -> list[str]:
    """Added time a rank, of 32 rows with 32 adapters."""
    swept = [r for r in ours if r["batch"] == r["adapters"] == 32]
    return [
        f"ranks that sum to {r['rank_sum']}: adds {1e3 * r['added_ms']:.1f} us, "
        f"{1e6 * r['added_ms'] / r['rank_sum']:.2f} ns a rank ({r['name']})"
        for r in sorted(swept, key=lambda r: r["rank_sum"])
    ]


def _added(point: Mapping[str, Record], impl: str) -> float:
    return max(LEAST_MS, point[impl]["added_ms"])


def _best_rival(point: Mapping[str, Record]) -> str:
    return min((impl for impl in point if impl not in OURS), key=lambda impl: _added(point, impl))


def _waits_for_host(point: Mapping[str, Record]) -> bool:
    return any(point[i]["host_fraction"] > HOST_BOUND for i in ("triton", _best_rival(point)))


if __name__ == "__main__":
    records = map(json.loads, Path(sys.argv[1]).read_text().splitlines())
    print(*lines({record["name"]: record for record in records}.values()), sep="\n")
