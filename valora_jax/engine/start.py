"""Brings an engine up: reads the checkpoint, plans the memory, compiles the steps."""

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress

from pallas_kernels.lora_matmul import LoraPool, tuned_table
from valora_jax import checkpoint
from valora_jax.config import EngineConfig
from valora_jax.engine.adapters import EngineAdapters
from valora_jax.engine.buckets import MAX_CHUNKS, default_step_tokens
from valora_jax.engine.core import EngineCore
from valora_jax.engine.events import Events
from valora_jax.engine.fill import Sources
from valora_jax.engine.image_cache import ImageCache
from valora_jax.engine.kv_blocks import KVBlocks
from valora_jax.engine.memory_plan import MemoryPlan, free_device_bytes
from valora_jax.engine.mergeable import Traits
from valora_jax.engine.modes import Modes
from valora_jax.engine.orchestrator import Orchestrator
from valora_jax.engine.plan import Gate
from valora_jax.engine.policies import make_policy
from valora_jax.engine.precision import Precision
from valora_jax.engine.request import Request
from valora_jax.engine.rounds import StepLimits
from valora_jax.engine.runner import Runner
from valora_jax.engine.scheduler import Scheduler
from valora_jax.engine.shapes import kernel_of
from valora_jax.engine.weights import StepWeights
from valora_jax.lora.device import DeviceAdapters
from valora_jax.media.clip_pixels import ClipPixels
from valora_jax.media.tokenizer import Tokenizer
from valora_jax.models import read_spec
from valora_jax.models.base_tensors import BaseTensors
from valora_jax.models.build import load_model, parameter_paths
from valora_jax.models.loading import read_config
from valora_jax.models.spec import Model, ModelSpec

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A running engine's parts."""

    spec: ModelSpec
    tokenizer: Tokenizer
    pixels: ClipPixels
    core: EngineCore
    runner: Runner
    memory: MemoryPlan
    events: Events


def start(folder: Path, config: EngineConfig, *, show_progress: bool) -> Parts:
    """Loads a checkpoint folder, Hugging Face's or Orbax's, and makes everything ready to serve.

    Raises:
      CheckpointError: the folder is no checkpoint that fits a known family.
      NotImplementedError: the family is known, but not this variant of it; or the kernels do not
        run on this device.
      ValueError: the configured sizes do not fit the device.
    """
    kernel_of(config.kernels)  # before anything is read: a wrong one is found at once
    console = Console(stderr=True, quiet=not show_progress)
    spec = read_spec(read_config(folder))
    tokenizer, pixels = Tokenizer.from_folder(folder), ClipPixels.from_folder(folder)
    precision = Precision.choose(config.dtype, stored=spec.stored_dtype)
    load = checkpoint.load_model if checkpoint.is_orbax(folder) else load_model
    model = load(folder, spec, dtype=precision.weights, progress=show_progress)
    return assemble(model, spec, config, precision, tokenizer, pixels, console)


def assemble(
    model: Model,
    spec: ModelSpec,
    config: EngineConfig,
    precision: Precision,
    tokenizer: Tokenizer,
    pixels: ClipPixels,
    console: Console,
) -> Parts:
    """Builds an engine's parts around a model."""
    _keep_compilations(config.compile_cache)
    max_tokens_per_step = config.max_tokens_per_step or default_step_tokens(
        max_requests=config.max_requests, tokens_per_image=spec.tokens_per_image
    )
    # A table of tiles that cannot be used is an error here, not in the middle of a compilation.
    tuned = tuned_table(jax.devices()[0].device_kind) is not None
    weights = StepWeights(model, spec, precision)
    memory = _plan_memory(model, spec, config, precision, copy_bytes=weights.copy_bytes)
    memory.print(console)
    events = Events()
    adapters = _adapters(model, spec, config, precision, events) if config.max_adapters else None
    images = _images(config, adapters)
    runner = Runner(
        weights,
        spec,
        config,
        max_tokens_per_step=max_tokens_per_step,
        precision=precision,
        memory=memory,
        sources=_sources(spec, config, tokenizer, images, adapters),
        adapters=adapters,
    )
    if memory.copy_bytes:
        weights.take_copy(runner.shapes.kernel)
    modes = None
    if adapters:
        modes = _modes(config, max_tokens_per_step, runner, adapters, weights, events)
    if config.warm_up:
        _warm_up(runner, adapters, modes, console, tuned=tuned)
    core = EngineCore(
        runner,
        _scheduler(config, memory, max_tokens_per_step, gates=[adapters, images]),
        images,
        adapters,
        modes=modes,
        tokenizer=tokenizer,
        # A CPU computes with the cores that plan: there is nothing to keep busy meanwhile.
        steps_ahead=config.steps_ahead or (1 if jax.default_backend() == "cpu" else 2),
    )
    return Parts(
        spec=spec,
        tokenizer=tokenizer,
        pixels=pixels,
        core=core,
        runner=runner,
        memory=memory,
        events=events,
    )


def _adapters(
    model: Model, spec: ModelSpec, config: EngineConfig, precision: Precision, events: Events
) -> EngineAdapters:
    base = BaseTensors(model, spec)
    return EngineAdapters(
        config,
        spec.adapter_target,
        dtype=precision.weights,
        linear_of=base.linear,
        head_VD=base.head,
        events=events,
    )


def _images(config: EngineConfig, adapters: EngineAdapters | None) -> ImageCache:
    return ImageCache(
        slots=config.image_slots,
        changes_vision=adapters.changes_vision if adapters else lambda ref: False,
    )


def _scheduler(
    config: EngineConfig,
    memory: MemoryPlan,
    max_tokens_per_step: int,
    *,
    gates: Sequence[Gate | None],
) -> Scheduler:
    return Scheduler(
        KVBlocks(
            num_pages=memory.kv_pages,
            page_tokens=config.page_tokens,
            enable_prefix_cache=config.prefix_cache,
        ),
        max_tokens_per_step=max_tokens_per_step,
        max_requests=config.max_requests,
        max_prefill_chunks=MAX_CHUNKS,
        max_waiting=config.max_waiting,
        max_request_tokens=memory.max_request_tokens,
        gates=[gate for gate in gates if gate is not None],
    )


def _modes(
    config: EngineConfig,
    max_tokens_per_step: int,
    runner: Runner,
    adapters: EngineAdapters,
    weights: StepWeights,
    events: Events,
) -> Modes:
    limits = StepLimits(
        max_requests=config.max_requests,
        max_tokens_per_step=max_tokens_per_step,
        max_prefill_chunks=MAX_CHUNKS,
        bucket=lambda decodes, prompt: runner.shapes.choose(decodes=decodes, prompt_tokens=prompt),
    )

    def pools() -> Mapping[str, LoraPool]:
        return adapters.arrays().pools

    traits = Traits(
        adapters,
        pools=pools,
        base=weights.energy() if weights.copy else None,
        events=events,
    )
    policy = make_policy(config.policy, max_wait_s=config.max_wait_s)
    modes = Modes(
        Orchestrator(policy, limits=limits, traits=traits),
        traits,
        adapters,
        weights.copy,
        pools=pools,
        merge_chunk_ms=limits.merge_chunk_ms,
        events=events,
    )
    adapters.on_forget = modes.forget
    return modes


def _plan_memory(
    model: Model, spec: ModelSpec, config: EngineConfig, precision: Precision, *, copy_bytes: int
) -> MemoryPlan:
    weights_bytes = sum(leaf.get_value().nbytes for leaf in parameter_paths(model).values())
    adapters_bytes = staged_bytes = 0
    if config.max_adapters:
        of_adapters = (config, spec.adapter_target)
        adapters_bytes = DeviceAdapters.size_bytes(*of_adapters, dtype=precision.weights)
        staged_bytes = DeviceAdapters.staged_bytes(*of_adapters, dtype=precision.weights)
    merges = config.merge == "copy" and config.policy != "unmerged"
    wants_copy = config.max_adapters > 0 and merges
    memory = MemoryPlan.make(
        config,
        spec,
        dtype=precision.prompts,
        weights_bytes=weights_bytes,
        copy_bytes=copy_bytes if wants_copy else 0,
        adapters_bytes=adapters_bytes,
        staged_bytes=staged_bytes,
        free_bytes=free_device_bytes(),
    )
    if wants_copy and not memory.copy_bytes:
        _log.warning(
            "no adapter will be folded into the weights: their copy takes %.2f GiB of %.2f GiB "
            'that are free, and the key-value cache needs those; merge="off" asks for no copy',
            copy_bytes / 2**30,
            memory.free_bytes / 2**30,
        )
    return memory


def _sources(
    spec: ModelSpec,
    config: EngineConfig,
    tokenizer: Tokenizer,
    images: ImageCache,
    adapters: EngineAdapters | None,
) -> Sources:
    def stop_ids(request: Request) -> list[int]:
        ends = set() if request.params.ignore_eos else set(tokenizer.stop_token_ids)
        return sorted(ends | set(request.params.stop_token_ids or ()))

    adapter_slot: Callable[[Request], int] = adapters.slot if adapters else lambda request: -1
    return Sources(
        page_tokens=config.page_tokens,
        tokens_per_image=spec.tokens_per_image,
        image_slot=images.slot,
        adapter_slot=adapter_slot,
        stop_ids=stop_ids,
    )


def _keep_compilations(folder: Path | None) -> None:
    """Lets JAX keep compiled steps between starts, unless it was told where already."""
    if folder is not None and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.expanduser()))
        # The default skips what compiles in under a second, which is most of a small model.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _warm_up(
    runner: Runner,
    adapters: EngineAdapters | None,
    modes: Modes | None,
    console: Console,
    *,
    tuned: bool,
) -> None:
    begin_s = time.monotonic()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("compiling steps", total=None)
        runner.warm_up(lambda done, total: bar.update(task, completed=done, total=total))
    if adapters:
        adapters.warm_up()
    if modes:
        modes.warm_up()
    # What is there now lasts. Looking for garbage in it would stall every answer, for 0.3 s with
    # half a million objects of a model of two layers.
    gc.collect()
    gc.freeze()
    seconds = time.monotonic() - begin_s
    tiles = "measured on this device" if tuned else "computed, see docs/tuning.md"
    console.print(
        f"{runner.traces} compiled functions in {seconds:.0f} s; tiles of LoRA on a GPU: {tiles}"
    )
