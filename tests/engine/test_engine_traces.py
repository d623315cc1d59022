"""After its start an engine compiles nothing, whatever it is asked."""

import contextlib
import gc
import itertools

import jax
import numpy as np
import pytest

from tests.engine.engines import ADAPTERS, CONFIG, GOLDENS, engine_of, load, with_images
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams

NAMES = [
    "a02_attn_suffix_r4",  # decoder and tower
    "a06_qv_r64",
    "a09_lm_head_saved",  # a whole head
    "a10_new_head",  # a task head
    "a17_lm_head_lora",
    "a05_vision_proj_r8",
]


@pytest.fixture
def fresh():
    """An engine none of whose functions another test has compiled."""
    jax.clear_caches()
    return Engine(GOLDENS / "checkpoints" / "llava15-tiny", CONFIG, show_progress=False)


@contextlib.contextmanager
def no_tracing():
    """JAX raises at whatever it would have to trace, and so to compile."""
    jax.config.update("jax_no_tracing", True)
    try:
        yield
    finally:
        jax.config.update("jax_no_tracing", False)


def use_everything(engine: Engine) -> None:
    load(engine, *NAMES)
    engine.combine_adapters("sum", {NAMES[1]: 0.5, NAMES[0]: 1.0})
    prompts = [
        "Hi",
        with_images("Describe it.", 0),
        with_images("Compare. " * 20, 1, 2),
        {"prompt_token_ids": [1, 2, 3]},
    ]
    kinds = [
        dict(temperature=0),
        dict(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01, n=2),
        dict(repetition_penalty=1.1, presence_penalty=1.0, frequency_penalty=0.1, min_tokens=2),
        dict(logprobs=3, prompt_logprobs=2, seed=1),
    ]
    asked = list(itertools.product(prompts, kinds, [None, "sum", *NAMES]))
    np.random.default_rng(0).shuffle(asked)
    engine.generate(
        [prompt for prompt, _, _ in asked],
        [SamplingParams(max_tokens=2 + i % 7, **kind) for i, (_, kind, _) in enumerate(asked)],
        adapter=[adapter for _, _, adapter in asked],
    )
    for prompt, adapter in itertools.product(prompts, [None, *NAMES]):  # alone, in small steps
        engine.generate(prompt, SamplingParams(max_tokens=2), adapter=adapter)
    engine.classify(prompts, adapter="a10_new_head")
    engine.prompt_logits(prompts, adapter=[None, *NAMES[:3]])
    stream = engine.stream(prompts[1], SamplingParams(), adapter=NAMES[5])
    next(stream)
    engine.load_adapter(NAMES[5], ADAPTERS / NAMES[5])
    engine.unload_adapter("sum")
    stream.close()


def test_nothing_is_traced_after_the_start_and_what_it_made_is_not_searched_for_garbage(fresh):
    traces = fresh.parts.runner.traces
    assert traces > 0
    assert gc.get_freeze_count() > len(gc.get_objects())
    with no_tracing():
        use_everything(fresh)
    assert fresh.parts.runner.traces == traces
    fresh.close()
    assert gc.get_freeze_count() == 0


def test_without_a_warm_up_a_shape_is_traced_when_it_is_first_met():
    engine = engine_of("llava15-tiny-gqa", warm_up=False)
    engine.generate("Hi", SamplingParams(max_tokens=3))
    assert engine.parts.runner.traces > 0
    with no_tracing():
        engine.generate("Hi", SamplingParams(max_tokens=3))
