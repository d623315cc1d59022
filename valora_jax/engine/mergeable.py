"""What policies must know of an adapter: how much work it is, and whether it can be merged."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import numpy as np

from pallas_kernels.lora_matmul import LoraPool
from valora_jax.engine.events import Events, MergeRefused
from valora_jax.engine.rounds import Adapter, AdapterTraits
from valora_jax.engine.weights import DECODER
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.strength import BaseEnergy, update_energy

_log = logging.getLogger(__name__)

# Rounding error over update, both as norms, above which an adapter is too weak to be merged. The
# error is spread over all directions of a matrix and the update over a few, so that far less than
# this share of an output's change is noise; above it the error is most of what a merge changes.
_MOST_LOSS = 0.5
# Update over weights, both as norms, above which an adapter is too strong: others' rows on its copy
# have the rounding errors of the merged weights, and only the weights are theirs.
_MOST_UPDATE = 1.0


class PlacedAdapters(Protocol):
    """What is asked of the engine's adapters."""

    def pages(self, ref: AdapterRef) -> Mapping[str, int]: ...
    def slot_of(self, ref: AdapterRef) -> int | None: ...


class Traits:
    """Measures each version once, on the device, when its arrays are there.

    Until then it counts as one that cannot be merged, nor ride on another's copy. Nothing here
    waits for the device.

    Attributes:
      refused: versions that were too weak or too strong.
    """

    def __init__(
        self,
        adapters: PlacedAdapters,
        *,
        pools: Callable[[], Mapping[str, LoraPool]],
        base: Mapping[str, list[BaseEnergy[float]]] | None,
        events: Events,
    ):
        """Args:
        adapters: where versions are.
        pools: the device's rank pages, as they are now.
        base: site -> energies of each layer, see `lora.strength`; None merges nothing.
        events: hear of refusals.
        """
        self.refused = 0
        self._adapters, self._pools, self._base = adapters, pools, base
        self._events = events
        self._known: dict[AdapterRef, AdapterTraits] = {}
        self._pending: dict[AdapterRef, dict[str, jax.Array]] = {}

    def __call__(self, ref: Adapter) -> AdapterTraits:
        """Those of a version that some request holds."""
        assert isinstance(ref, AdapterRef)  # the engine's requests bring no others
        if (known := self._known.get(ref)) is not None:
            return known
        mergeable = self._measure(ref) if self._base is not None else False
        traits = AdapterTraits(pages=self._mean_pages(ref), mergeable=bool(mergeable))
        if mergeable is not None:
            self._known[ref] = traits
        return traits

    def warm_up(self) -> None:
        """Compiles the measurement."""
        update_energy(self._decoder_pools(), np.int32(0))

    def forget(self, ref: AdapterRef) -> None:
        """Drops what is known of a version that is gone."""
        self._known.pop(ref, None)
        self._pending.pop(ref, None)

    def _measure(self, ref: AdapterRef) -> bool | None:
        """Whether a version can be merged; None while that is not known."""
        if (energy := self._pending.get(ref)) is None:
            if (slot := self._adapters.slot_of(ref)) is not None:
                energy = update_energy(self._decoder_pools(), np.int32(slot))
                # Now: a copy that is asked for later waits for those of the steps in flight.
                jax.tree.map(lambda x: x.copy_to_host_async(), energy)
                self._pending[ref] = energy
            return None
        # Types of jax lack `is_ready`, its documentation has it.
        if not all(x.is_ready() for x in energy.values()):  # pyright: ignore[reportAttributeAccessIssue]
            return None
        refusal = self._refusal(jax.device_get(self._pending.pop(ref)))
        if refusal is None:
            return True
        self.refused += 1
        _log.warning("adapter %r version %d is served unmerged: %s", ref.name, ref.version, refusal)
        self._events.send(MergeRefused(adapter=ref, reason=refusal))
        return False

    def _refusal(self, energy: Mapping[str, np.ndarray]) -> str | None:
        """Why an adapter of these updates is not merged; None if it can be."""
        assert self._base is not None
        update = weights = rounding = 0.0
        for site, energy_L in energy.items():
            changed_L = energy_L != 0  # NaN is a change, too
            update += float(energy_L[changed_L].sum())
            of_site_LE = np.array(self._base[site])[changed_L]
            weights, rounding = weights + of_site_LE[:, 0].sum(), rounding + of_site_LE[:, 1].sum()
        if update == 0:  # without a part in the decoder there is nothing to lose
            return None
        if not math.isfinite(update):
            return "its update is not finite"
        if (loss := math.sqrt(rounding / update)) > _MOST_LOSS:
            return (
                f"rounding merged weights would lose {loss:.0%} of its update, "
                f"at most {_MOST_LOSS:.0%} are accepted"
            )
        if update > _MOST_UPDATE**2 * weights:
            return (
                f"its update is {math.sqrt(update / weights):.1f} times as large as the weights, "
                f"at most {_MOST_UPDATE:.1f} are accepted: others on its copy bear its rounding"
            )
        return None

    def _mean_pages(self, ref: AdapterRef) -> float:
        """Pages of a linear of the decoder, weighed by what a page of it holds."""
        pages, total, weights = self._adapters.pages(ref), 0.0, 0.0
        for site, pool in self._decoder_pools().items():
            weight = pool.a_RD.shape[1] + pool.b_RE.shape[1]
            weights += weight
            total += weight * pages.get(site, 0)
        return total / weights

    def _decoder_pools(self) -> dict[str, LoraPool]:
        return {site: pool for site, pool in self._pools().items() if site.startswith(DECODER)}
