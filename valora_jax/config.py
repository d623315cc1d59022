"""Settings of the engine. The command line's flags and the keys of TOML files are these fields."""

import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Kernels = Literal["auto", "triton", "xla"]
PolicyName = Literal["valora", "unmerged", "merged", "dlora"]
Merge = Literal["copy", "off"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes are fixed when the engine starts; memory is taken then, and nothing compiles later.

    Attributes:
      dtype: of weights and arithmetic. "auto" is the checkpoint's 16-bit type on an accelerator; on
        a CPU float32, with prompts, their cache and decodes of several requests in bfloat16 if this
        CPU multiplies that faster.
      kernels: implementation of LoRA and attention. "auto" is "triton" on an NVIDIA GPU and "xla"
        elsewhere.
      max_requests: requests that run at once; more wait.
      max_waiting: requests in the queue; more are refused.
      max_tokens_per_step: prompt and decode tokens of one step; None is two prompts of an image
        and a short text. Longer prompts take several steps.
      steps_ahead: decode steps in flight while the tokens of an earlier one are read, as long as
        no request waits for room or has prompt left, and pages last; otherwise 1. None is 2 on an
        accelerator and 1 on a CPU.
      max_request_tokens: prompt and answer together; None is what the model's positions allow.
      page_tokens: tokens of a key-value page; prefixes are shared in whole pages.
      kv_pages: key-value pages; None takes what the requests can use and the memory allows.
      memory_fraction: of the memory free after loading that the engine may take; None is 0.9 on an
        accelerator and 0.2 on a CPU, whose memory others need.
      prefix_cache: share pages of equal prefixes between requests of the same adapter.
      image_slots: images whose features are kept on the device.
      max_adapters: adapters on the device at once; 0 serves the base model alone. More can be
        loaded, and take turns.
      lora_pages: pages of 16 rank rows a kind of linear in the decoder, tower and head.
      projector_lora_pages: the same for the projector, which some adapters replace whole.
      max_replaced_heads: adapters on the device that bring a whole `lm_head`.
      max_classes: outputs of the largest task head; 0 takes no task heads.
      host_adapter_bytes: adapters kept in host memory; others are read again when needed.
      policy: who chooses how steps use adapters, see docs/modes.md. "valora" folds a hot adapter
        into the weights while that pays, "unmerged" never does; "merged" serves one adapter at a
        time, "dlora" follows dLoRA: these two are for comparison.
      max_wait_s: how long a policy may hold back a request, until its first token and from token
        to token.
      merge: "copy" keeps a second copy of the decoder's linears to fold adapters into, unless the
        policy is "unmerged" or the key-value cache would lose half of its memory; "off" saves it,
        and no step is merged then.
      compile_cache: folder for compiled steps, so that the next start is quick; None compiles anew.
        Programs are loaded from it, so nobody else may write there.
      warm_up: compile every step's shape at the start. Without it a shape compiles when first met.
      seed: of requests that bring none.

    Raises:
      ValueError: a size is out of range, or a name is unknown; lists every fault.
    """

    dtype: Dtype = "auto"
    kernels: Kernels = "auto"
    max_requests: int = 16
    max_waiting: int = 1024
    max_tokens_per_step: int | None = None
    steps_ahead: int | None = None
    max_request_tokens: int | None = None
    page_tokens: int = 64
    kv_pages: int | None = None
    memory_fraction: float | None = None
    prefix_cache: bool = True
    image_slots: int = 32
    max_adapters: int = 16
    lora_pages: int = 32
    projector_lora_pages: int = 32
    max_replaced_heads: int = 0
    max_classes: int = 128
    host_adapter_bytes: int = 16 * 2**30
    policy: PolicyName = "valora"
    max_wait_s: float = 0.5
    merge: Merge = "copy"
    compile_cache: Path | None = Path("~/.cache/valora_jax/compiled")
    warm_up: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "max_requests": 1,
            "max_waiting": 1,
            "max_tokens_per_step": 1,
            "steps_ahead": 1,
            "max_request_tokens": 2,
            "page_tokens": 1,
            "kv_pages": 2,
            "image_slots": 1,
            "max_adapters": 0,
            "lora_pages": 1,
            "projector_lora_pages": 1,
            "max_replaced_heads": 0,
            "max_classes": 0,
            "host_adapter_bytes": 0,
        }
        values = {name: getattr(self, name) for name in least}
        faults = [
            f"{name}={values[name]} must be at least {low}"
            for name, low in least.items()
            if values[name] is not None and not values[name] >= low  # NaN is not, either
        ]
        names = {"dtype": Dtype, "kernels": Kernels, "policy": PolicyName, "merge": Merge}
        for name, known in names.items():
            if (value := getattr(self, name)) not in get_args(known):
                faults.append(f"{name}={value!r} is not one of {', '.join(get_args(known))}")
        if self.policy == "merged" and self.merge == "off":
            faults.append(
                'policy="merged" with merge="off" would serve one adapter at a time for nothing'
            )
        if not 0 < self.max_wait_s < math.inf:
            faults.append(
                f"max_wait_s={self.max_wait_s} must be positive, as a step takes time itself, "
                "and finite"
            )
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            faults.append(f"memory_fraction={self.memory_fraction} is not in (0, 1]")
        if self.max_tokens_per_step is not None and self.max_requests > self.max_tokens_per_step:
            faults.append(
                f"max_requests={self.max_requests} exceeds max_tokens_per_step="
                f"{self.max_tokens_per_step}: a step must hold one token of every request"
            )
        if faults:
            raise ValueError("\n  ".join(["the engine's settings are wrong:", *faults]))
