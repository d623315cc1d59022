"""What an engine counts, as one snapshot that a server can export."""

import dataclasses
from collections.abc import Mapping

from valora_jax.engine.core import EngineCore
from valora_jax.engine.request import FinishReason
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.mode import Mode


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineMetrics:
    """Counters grow from the engine's start; the others are of this moment.

    Attributes:
      running, waiting: requests.
      finished: requests by reason, a counter.
      preemptions: times that a request lost its pages, a counter.
      mode_seconds: time of steps by mode, a counter, as are all below but for `folded`.
      mode_tokens: tokens by how their rows ran: on weights that have their own adapter in them
        (merged), on weights that have another one (mixture), on the base weights (unmerged).
      switches: merges begun.
      interrupted_merges: of those, replaced before they were whole.
      refused_merges: versions too weak for the rounding of merged weights.
      adapter_uploads: versions written to the device.
      folded: whose merged copy steps may use; None while there is none that is whole.
      resident: versions on the device, in use or not.
    """

    running: int
    waiting: int
    finished: Mapping[FinishReason, int]
    preemptions: int
    mode_seconds: Mapping[Mode, float]
    mode_tokens: Mapping[Mode, int]
    switches: int
    interrupted_merges: int
    refused_merges: int
    adapter_uploads: int
    folded: AdapterRef | None
    resident: tuple[AdapterRef, ...]

    @classmethod
    def of(cls, core: EngineCore) -> "EngineMetrics":
        """Reads the counters; not while a step is planned."""
        scheduler, modes, adapters = core.scheduler, core.modes, core.adapters
        folded = modes.orchestrator.copy.usable if modes else None
        refs = [info.ref for info in adapters.infos()] if adapters else []
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            finished=dict(scheduler.finished),
            preemptions=scheduler.preemptions,
            mode_seconds=dict(modes.orchestrator.seconds) if modes else dict.fromkeys(Mode, 0.0),
            mode_tokens={mode: modes.tokens[mode] if modes else 0 for mode in Mode},
            switches=modes.orchestrator.switches if modes else 0,
            interrupted_merges=modes.orchestrator.interrupted if modes else 0,
            refused_merges=modes.traits.refused if modes else 0,
            adapter_uploads=adapters.uploads if adapters else 0,
            folded=folded if isinstance(folded, AdapterRef) else None,
            resident=tuple(r for r in refs if adapters and adapters.slot_of(r) is not None),
        )
