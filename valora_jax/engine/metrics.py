"""What an engine counts, as one snapshot that a server can export."""

import dataclasses
from collections.abc import Mapping

from valora_jax.engine.core import EngineCore
from valora_jax.engine.request import FinishReason
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.mode import Mode
from valora_jax.lora.residency import Residency


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineMetrics:
    """Counters only grow, from the engine's start on; gauges are of this moment.

    Attributes:
      running: gauge; requests that steps serve.
      waiting: gauge; requests in the queue.
      finished: counter; requests by reason.
      preemptions: counter; times that a request lost its pages.
      mode_seconds: counter; time of steps by mode.
      mode_tokens: counter; tokens by how their rows ran: on weights that have their own adapter in
        them (merged), on weights that have another one (mixture), on the base weights (unmerged).
      mode_changes: counter; steps that ran in another mode than the step before.
      switches: counter; merges begun. To go on with one, or to leave the copy, is none.
      interrupted_merges: counter; of those, that lost the copy before it was whole.
      refused_merges: counter; versions too weak, or too strong, to be merged.
      merge_ms: gauge; estimate of the device's time for a merge; None where nothing is merged.
      folded: gauge; whose merged copy steps may use; None while there is none that is whole.
      adapter_uploads: counter; versions written to the device.
      adapter_evictions: counter; versions whose place on the device another one took.
      resident: gauge; versions on the device, in use or not.
      pinned: gauge; versions that stay on the device once they are there.
      adapter_pages: gauge, constant; site -> pages of 16 rank rows on the device. A replaced head
        is a page of a site of its own.
      adapter_pages_in_use: gauge; of those, that resident versions have.
    """

    running: int
    waiting: int
    finished: Mapping[FinishReason, int]
    preemptions: int
    mode_seconds: Mapping[Mode, float]
    mode_tokens: Mapping[Mode, int]
    mode_changes: int
    switches: int
    interrupted_merges: int
    refused_merges: int
    merge_ms: float | None
    folded: AdapterRef | None
    adapter_uploads: int
    adapter_evictions: int
    resident: tuple[AdapterRef, ...]
    pinned: tuple[AdapterRef, ...]
    adapter_pages: Mapping[str, int]
    adapter_pages_in_use: Mapping[str, int]

    @classmethod
    def of(cls, core: EngineCore) -> "EngineMetrics":
        """Reads the counters; not while a step is planned."""
        scheduler, modes, adapters = core.scheduler, core.modes, core.adapters
        orchestrator = modes.orchestrator if modes else None
        residency = adapters.residency if adapters else Residency({}, slots=0)
        folded = orchestrator.copy.usable if orchestrator else None
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            finished=dict(scheduler.finished),
            preemptions=scheduler.preemptions,
            mode_seconds=dict(orchestrator.seconds) if orchestrator else dict.fromkeys(Mode, 0.0),
            mode_tokens={mode: modes.tokens[mode] if modes else 0 for mode in Mode},
            mode_changes=orchestrator.mode_changes if orchestrator else 0,
            switches=orchestrator.switches if orchestrator else 0,
            interrupted_merges=orchestrator.interrupted if orchestrator else 0,
            refused_merges=modes.traits.refused if modes else 0,
            merge_ms=modes.orchestrator.costs.merge_ms if modes and modes.copy else None,
            folded=folded if isinstance(folded, AdapterRef) else None,
            adapter_uploads=adapters.uploads if adapters else 0,
            adapter_evictions=residency.evictions,
            resident=residency.resident,
            pinned=residency.pinned,
            adapter_pages={site: n - 1 for site, n in residency.pages_of_site.items()},
            adapter_pages_in_use=residency.pages_in_use,
        )
