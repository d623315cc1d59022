"""An engine's adapters without the engine."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.engine.engines import ADAPTERS, CONFIG, GOLDENS
from valora_jax.engine.adapters import EngineAdapters
from valora_jax.engine.events import Events
from valora_jax.engine.request import Request
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.host_store import AdapterInfo, AdapterRef
from valora_jax.models import read_spec
from valora_jax.models.loading import read_config

TARGET = read_spec(read_config(GOLDENS / "checkpoints" / "llava15-tiny")).adapter_target
A, B, VISION = "a01_attn_lm_r8", "a19_attn_lm_r8_b", "a05_vision_proj_r8"
WIDE = "a06_qv_r64"


@contextlib.contextmanager
def bare_adapters() -> Iterator[Callable[..., EngineAdapters]]:
    """Yields a function that makes them, whose arguments are changes of the config, or who hears of
    them; closes them."""
    made = []

    def make(*, events: Events | None = None, **changes) -> EngineAdapters:
        def no_base(*_):
            raise AssertionError("none of these adapters needs the base")

        config = dataclasses.replace(CONFIG, **changes)
        made.append(
            EngineAdapters(
                config,
                TARGET,
                dtype=np.dtype(np.float32),
                linear_of=no_base,
                head_VD=no_base,
                events=events or Events(),
            )
        )
        return made[-1]

    yield make
    for adapters in made:
        adapters.close()


def loaded(adapters: EngineAdapters, name: str, folder: Path | None = None) -> AdapterInfo:
    """Loads a folder under a name; the golden adapter of that name if there is none."""
    return adapters.register(adapters.read(name, folder or ADAPTERS / name))


def pinned(adapters: EngineAdapters, name: str) -> None:
    """Pins an adapter and waits for it, as the engine does."""
    ref = adapters.pin(name)
    while adapters.coming(ref):
        adapters.wait()


def request_of(adapter: AdapterRef | None) -> Request:
    return Request(
        id="r", prompt_token_ids=[1], params=SamplingParams(max_tokens=1), adapter=adapter
    )


def staged(adapters: EngineAdapters) -> None:
    """Waits for all that is on its way to the device."""
    while adapters.wait():
        pass


def acquired(adapters: EngineAdapters, request: Request) -> bool:
    """Whether the request has its adapter at the second attempt, once that had time to come."""
    if adapters.acquire(request):
        return True
    staged(adapters)
    return adapters.acquire(request)


def on_device(adapters: EngineAdapters) -> list[str]:
    return [info.ref.name for info in adapters.infos() if adapters.slot_of(info.ref) is not None]
