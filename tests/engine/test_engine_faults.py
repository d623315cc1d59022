"""Bad input: a clear error, and afterwards the engine answers as before and holds nothing."""

import dataclasses
import io
import itertools
import json
import struct
import zlib

import numpy as np
import pytest

from tests.engine.engines import (
    ADAPTERS,
    CONFIG,
    GOLDENS,
    answer,
    assert_nothing_is_held,
    engine_of,
    image,
    load,
    with_images,
)
from valora_jax.config import EngineConfig
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.errors import (
    AdapterNotFoundError,
    CheckpointError,
    ImageError,
    OutOfCapacityError,
    RequestTooLongError,
)

QUESTION = "USER: Which sign is closer? ASSISTANT:"
LORA = "a03_all_linear_lm_r16"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BAD_ADAPTERS = {
    name: entry
    for name, entry in json.loads((ADAPTERS / "bad" / "index.json").read_text()).items()
    if entry["expect"] == "reject"
}


@pytest.fixture(scope="module")
def want():
    return answer(engine_of(), QUESTION, max_tokens=8)


@pytest.fixture
def engine(want):
    """Checked to be well after the test."""
    engine = engine_of()
    yield engine
    assert answer(engine, QUESTION, max_tokens=8) == want
    assert_nothing_is_held()


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 100,000 pixels wide and high."""
    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def truncated() -> bytes:
    data = io.BytesIO()
    image(0).save(data, "PNG")
    return data.getvalue()[:200]


def pictured(*images, text: str = "<image>") -> dict:
    return {"prompt": text, "multi_modal_data": {"image": [*images]}}


def ids(*tokens) -> dict:
    return {"prompt_token_ids": list(tokens)}


BAD_PROMPTS = {
    "a text file as an image": (pictured(b"hello"), ImageError, "cannot"),
    "a missing file": (pictured("/no/such/file.png"), ImageError, "no/such/file"),
    "an address": (pictured("http://host/cat.png"), ImageError, "http"),
    "a truncated image": (pictured(truncated()), ImageError, "truncated"),
    "a bomb": (pictured(bomb()), ImageError, "pixels"),
    "an image of another type": (pictured(np.zeros((4, 4), np.float64)), ImageError, "uint8"),
    "a bad image after a good one": (
        pictured(image(0), b"hello", text="<image><image>"),
        ImageError,
        "cannot",
    ),
    "no image for a placeholder": ("<image>", ValueError, "1 image placeholders.* 0 images"),
    "more images": (pictured(image(0), image(1)), ValueError, "1 image placeholders.* 2 images"),
    "images without a placeholder": (pictured(image(0), text="x"), ValueError, "0 image place"),
    "more images than slots": (
        pictured(*map(image, range(5)), text="<image>" * 5),
        ValueError,
        "5 images, the engine holds 4 at once; raise EngineConfig.image_slots",
    ),
    "too long a text": ("word " * 600, RequestTooLongError, "holds 512 a request"),
    "exactly one token too long": (ids(*[5] * 512), RequestTooLongError, "512 tokens"),
    "too long with images": (
        pictured(image(0), image(1), text="<image><image>" + "word " * 480),
        RequestTooLongError,
        r"\(32 from images\)",
    ),
    "an id beyond the vocabulary": (ids(1, 704), ValueError, r"outside \[0, 704\).*704 at pos"),
    "a negative id": (ids(1, -1), ValueError, r"outside \[0, 704\)"),
    "an id of another type": (ids(1, 2.0), ValueError, "integers"),
    "no ids": (ids(), ValueError, "no tokens"),
    "a number": (5, ValueError, "a text or a dict"),
    "an unknown key": ({"text": "x"}, ValueError, "keys"),
    "two kinds of prompt": (ids(1) | {"prompt": "x"}, ValueError, "keys"),
    "half a character": ("\ud800", ValueError, "valid Unicode"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_before_any_prompt_runs(engine, name):
    prompt, error, message = BAD_PROMPTS[name]
    steps = engine.parts.runner.traces, engine.parts.core.scheduler.finished.total()
    for call in (
        lambda: engine.generate([QUESTION, prompt], GREEDY),
        lambda: engine.stream(prompt, GREEDY),
        lambda: engine.prompt_logits([prompt]),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not engine.parts.core.has_work
    assert steps == (engine.parts.runner.traces, engine.parts.core.scheduler.finished.total())


def test_an_empty_text_is_the_token_that_begins_every_text(engine):
    (output,) = engine.generate("", GREEDY)
    assert list(output.prompt_token_ids) == [engine.parts.tokenizer.bos_token_id]


def test_the_longest_prompt_has_room_for_one_token(engine):
    got = answer(engine, ids(*[5] * 511), max_tokens=8)
    assert (len(got.token_ids), got.finish_reason) == (1, "length")


@pytest.mark.parametrize("call", ["generate", "stream", "classify", "prompt_logits"])
def test_an_unknown_adapter_is_refused_with_the_names_there_are(engine, call):
    load(engine, LORA)
    prompts = QUESTION if call == "stream" else [QUESTION]
    with pytest.raises(AdapterNotFoundError, match=f"no adapter 'nobody'; loaded: .*{LORA}"):
        getattr(engine, call)(prompts, adapter="nobody")


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_a_bad_adapter_is_refused_and_the_loaded_one_stays(engine, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(engine, LORA)
    before = engine.list_adapters()
    with pytest.raises((ValueError, NotImplementedError)):
        engine.load_adapter(LORA, ADAPTERS / "bad" / name)
    assert engine.list_adapters() == before
    assert list(tmp_path.iterdir()) == []  # nothing in the folder was executed


@pytest.mark.parametrize("name", ["x01_ia3", "a14_embed_lora_r4"])
def test_a_kind_that_is_not_served_is_refused(engine, name):
    with pytest.raises((ValueError, NotImplementedError)):
        engine.load_adapter("kind", ADAPTERS / name)
    with pytest.raises((ValueError, OSError), match="no_such_folder"):
        engine.load_adapter("kind", ADAPTERS / "no_such_folder")
    assert "kind" not in {info.ref.name for info in engine.list_adapters()}


@pytest.mark.parametrize("adapter", [LORA, None, [None, "a10_new_head"]])
def test_who_has_no_task_head_cannot_classify(engine, adapter):
    load(engine, LORA, "a10_new_head")
    with pytest.raises(ValueError, match="task head"):
        engine.classify([QUESTION, "Hi"], adapter=adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=-1), "temperature=-1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_p=0), "top_p=0"),
        (dict(max_tokens=0), "max_tokens=0"),
        (dict(logprobs=21), "logprobs=21"),
        (dict(seed=2**63), "seed=9223372036854775808"),
        (dict(stop_token_ids=[2**31], min_tokens=1), "stop_token_ids"),
        (dict(stop=""), "stop=''"),
    ],
    ids=str,
)
def test_sampling_values_out_of_range_never_reach_the_engine(engine, settings, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(QUESTION, SamplingParams(**settings))


def test_stop_tokens_beyond_the_vocabulary_stop_nothing(engine, want):
    params = dict(stop_token_ids=[704, 10**6, 2**31 - 1], min_tokens=3)
    assert answer(engine, QUESTION, max_tokens=8, **params) == want


def test_more_stop_tokens_than_can_be_held_back_are_refused(engine):
    params = dataclasses.replace(GREEDY, stop_token_ids=list(range(3, 20)), min_tokens=1)
    with pytest.raises(ValueError, match="18 stop tokens; at most 16 can be held back"):
        engine.generate(QUESTION, params)


@pytest.mark.parametrize("what", ["sampling_params", "adapter"])
@pytest.mark.parametrize("entries", [0, 1, 3])
def test_settings_for_another_number_of_prompts_are_refused(engine, what, entries):
    value = {"sampling_params": GREEDY, "adapter": None}[what]
    with pytest.raises(ValueError, match=f"{what} has {entries} entries for 2 prompts"):
        engine.generate([QUESTION, "Hi"], **{what: [value] * entries})


def test_a_full_queue_refuses_streams_and_keeps_generate_waiting(engine, want, monkeypatch):
    load(engine, LORA)
    monkeypatch.setattr(engine.parts.core.scheduler, "_max_waiting", 2)
    streams = [engine.stream(QUESTION, GREEDY) for _ in range(2)]
    with pytest.raises(OutOfCapacityError, match="2 requests are waiting and the queue holds 2"):
        engine.stream(QUESTION, GREEDY, adapter=LORA)
    assert [info.users for info in engine.list_adapters() if info.ref.name == LORA] == [0]
    outputs = engine.generate([QUESTION] * 9, GREEDY)
    assert [output.outputs[0] for output in outputs] == [want] * 9
    assert [[*stream][-1].outputs[0] for stream in streams] == [want] * 2
    with pytest.raises(OutOfCapacityError, match="no room for 3 more"):
        engine.generate(QUESTION, SamplingParams(n=3, max_tokens=2))


def test_an_error_of_one_caller_leaves_the_streams_of_others(engine, want):
    stream = engine.stream(QUESTION, GREEDY)
    next(stream)
    with pytest.raises(ImageError):
        engine.generate(pictured(b"hello"), GREEDY)
    with pytest.raises(AdapterNotFoundError):
        engine.generate([QUESTION] * 2, GREEDY, adapter=[None, "nobody"])
    *_, last = stream
    assert last.outputs[0] == want


def test_generate_that_is_interrupted_leaves_nothing_behind(engine, monkeypatch):
    steps = itertools.count()
    step = engine.parts.core.step

    def interrupted():
        if next(steps) == 5:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine.parts.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([with_images("a", i) for i in range(9)], GREEDY)
    assert not engine.parts.core.scheduler.has_work


def test_messages_of_a_wrong_form_are_refused(engine):
    for messages in ([{"role": "user"}], [{"content": "x"}], [[5]]):
        with pytest.raises(ValueError, match=r"messages\[0\]"):
            engine.chat(messages, GREEDY)


def test_an_engine_that_cannot_start_says_why(tmp_path):
    with pytest.raises((CheckpointError, ValueError), match="nothing_here"):
        Engine(tmp_path / "nothing_here", CONFIG, show_progress=False)
    large = dataclasses.replace(CONFIG, kv_pages=10**9)
    with pytest.raises(ValueError, match="needs 1000000000 pages"):
        Engine(GOLDENS / "checkpoints" / "llava15-tiny", large, show_progress=False)


def test_kernels_of_another_device_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    config = dataclasses.replace(CONFIG, kernels="triton")
    with pytest.raises(NotImplementedError, match=r"NVIDIA GPUs only.*'tpu' here; set kernels="):
        Engine(tmp_path / "nothing_here", config, show_progress=False)


def test_an_engine_without_adapters_serves_the_base_model_alone(want):
    config = EngineConfig(**{**dataclasses.asdict(CONFIG), "max_adapters": 0, "warm_up": False})
    engine = Engine(GOLDENS / "checkpoints" / "llava15-tiny", config, show_progress=False)
    assert answer(engine, QUESTION, max_tokens=8) == want
    assert engine.list_adapters() == []
    with pytest.raises(AdapterNotFoundError, match="loaded: none"):
        engine.generate(QUESTION, adapter=LORA)
    with pytest.raises(ValueError, match=r"serves no adapters; raise EngineConfig\.max_adapters"):
        engine.load_adapter(LORA, ADAPTERS / LORA)
