"""Adapters of random numbers at any size, for measuring: all are views of one small block."""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from valora_jax.lora.adapter import Adapter, AdapterTarget, LoraPair, LoraSite
from valora_jax.replay.settings import Targets

_ATTENTION = {"decoder.q", "decoder.k", "decoder.v", "decoder.o"}
_SPARE_NUMBERS = 2**22  # different views begin at different numbers of the block
# Size of an update over that of the weights that it is added to: rounding does not lose it.
_STRENGTH = 0.1


def random_adapters(
    target: AdapterTarget, *, number: int, ranks: Sequence[int], targets: Targets, seed: int
) -> list[Adapter]:
    """Makes adapters on linears of the decoder, in bfloat16.

    Args:
      target: the model's sites.
      number: how many; adapter i is named `adapter_name(i)`.
      ranks: of adapter 0, 1, ..., in turn.
      targets: which linears.
      seed: of the numbers.
    """
    sites = [
        site
        for site in target.sites
        if site.name.startswith("decoder.") and (targets == "all" or site.name in _ATTENTION)
    ]
    largest = max(ranks) * max(max(site.in_width, site.out_width) for site in sites)
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(largest + _SPARE_NUMBERS, np.float32).astype(ml_dtypes.bfloat16)

    def view(rank: int, width: int) -> np.ndarray:
        start = int(rng.integers(_SPARE_NUMBERS))
        return block[start : start + rank * width].reshape(rank, width)

    def pair(site: LoraSite, rank: int) -> LoraPair:
        return LoraPair(
            a_RK=view(rank, site.in_width),
            b_RN=view(rank, site.out_width),
            # Random weights are about in_width ** -0.5 each, which is what trained ones are, too.
            scale=_STRENGTH * (rank * site.in_width) ** -0.5,
        )

    return [
        Adapter(
            name=adapter_name(i),
            source="random",
            pairs={
                site.name: {
                    layer: pair(site, ranks[i % len(ranks)]) for layer in range(site.layers)
                }
                for site in sites
            },
        )
        for i in range(number)
    ]


def adapter_name(number: int) -> str:
    return f"adapter-{number}"
