"""Engines of the tiny models, made once a session; those of one model share their shapes.

What differs between the configs of one model is chosen so that the steps are compiled once and then
come out of the compilation cache.
"""

import dataclasses
import functools
import gc
import json
from pathlib import Path

import numpy as np
from PIL import Image

from valora_jax.config import EngineConfig
from valora_jax.engine.engine import Engine
from valora_jax.engine.outputs import CompletionOutput
from valora_jax.engine.policies import make_policy
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.media.prompts import Prompt

GOLDENS = Path(__file__).parent.parent / "goldens"
ADAPTERS = GOLDENS / "adapters"
ADAPTER_INDEX = json.loads((ADAPTERS / "index.json").read_text())

CONFIG = EngineConfig(
    dtype="float32",
    max_requests=4,
    max_waiting=64,
    max_tokens_per_step=64,
    max_request_tokens=512,
    page_tokens=16,
    kv_pages=33,  # one request of the greatest length; four long ones preempt each other
    image_slots=4,
    max_adapters=3,
    lora_pages=8,
    projector_lora_pages=16,
    max_replaced_heads=1,
    max_classes=8,
    compile_cache=None,
)
# A compiled function has dozens of memory maps, of which Linux gives a process 65,530.
MOST_ENGINES = 5
_ENGINES: dict[tuple, Engine] = {}  # least recently asked for first


def engine_of(model: str = "llava15-tiny", **changes) -> Engine:
    """The session's engine for a model and for what differs from `CONFIG`, made again if it was
    long ago that a test had it.

    Unless a policy is among the changes it decides "unmerged": others go by times, which differ
    from run to run.
    """
    key = (model, *sorted(changes.items()))
    if (engine := _ENGINES.pop(key, None)) is None:
        forget_engines(all_but=MOST_ENGINES - 1)
        config = dataclasses.replace(CONFIG, **changes)
        engine = Engine(GOLDENS / "checkpoints" / model, config, show_progress=False)
        if "policy" not in changes:
            unmerged = make_policy("unmerged", max_wait_s=config.max_wait_s)
            engine.parts.core.modes.orchestrator.set_policy(unmerged)
    _ENGINES[key] = engine
    return engine


def forget_engines(*, all_but: int = 0) -> None:
    """Drops the engines that were asked for longest ago, and what was compiled for them."""
    for key in list(_ENGINES)[: max(len(_ENGINES) - all_but, 0)]:
        _ENGINES.pop(key).close()
    gc.collect()


def load(engine: Engine, *names: str) -> None:
    """Loads golden adapters under their own names, unless they are loaded."""
    loaded = {info.ref.name for info in engine.list_adapters() if info.current}
    for name in names:
        if name not in loaded:
            engine.load_adapter(name, ADAPTERS / name)


@functools.cache
def image(number: int) -> Image.Image:
    """A picture of noise, another one for each number."""
    noise_HW3 = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
    return Image.fromarray(noise_HW3)


def with_images(text: str, *numbers: int) -> dict:
    """A prompt of images of noise and a text."""
    images = [image(number) for number in numbers]
    return {"prompt": "<image>" * len(images) + text, "multi_modal_data": {"image": images}}


def assert_nothing_is_held() -> None:
    """No engine of the session has a request, page, row, adapter or image of one left."""
    for engine in _ENGINES.values():
        core = engine.parts.core
        while core.has_work:  # steps in flight, of requests that have ended
            assert not core.scheduler.has_work
            core.step()
        core.scheduler._blocks.check([])
        assert core.scheduler._blocks.free_pages == engine.parts.memory.kv_pages - 1
        assert sorted(core.scheduler._free_rows) == list(range(engine.config.max_requests))
        assert core.images.held_slots == 0
        assert core.adapters.residency.in_use == 0
        assert [i for i in engine.list_adapters() if i.users or not i.current] == []
        assert [core._jobs, core.images._held, core.adapters._slot_of] == [{}, {}, {}]
        assert engine._generations == {}


def answer(
    engine: Engine, prompt: Prompt, *, adapter: str | None = None, **params
) -> CompletionOutput:
    """The one answer to a prompt that has the engine to itself; greedy unless told otherwise."""
    sampling = SamplingParams(**dict(temperature=0, ignore_eos=True) | params)
    (output,) = engine.generate(prompt, sampling, adapter=adapter)
    return output.outputs[0]
