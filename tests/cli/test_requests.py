"""Requests as lines of JSON: one batch, in order, and a bad line stops no other."""

import json

import pytest

from tests.cli.tiny_engine import ADAPTERS, CONFIG, IMAGES, MODEL
from valora_jax.cli.requests import Defaults, answer_of, answer_requests, as_prompt
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(scope="module")
def engine():
    with Engine(MODEL, CONFIG, show_progress=False) as engine:
        engine.load_adapter("a", ADAPTERS / "a01_attn_lm_r8")
        yield engine


def answers(engine, *lines, adapter=None, raw=False):
    own = Defaults(folder=IMAGES, sampling=GREEDY, adapter=adapter, raw=raw)
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(answer_requests(engine, encoded, own))


def test_answers_keep_order_and_id_and_equal_those_of_generate(engine):
    lines = [{"prompt": f"Tell me {i}", "id": f"line {i}"} for i in range(20)]
    found = answers(engine, *lines)
    assert [answer["id"] for _, answer in found] == [line["id"] for line in lines]
    prompts = [as_prompt(engine, line["prompt"], images=(), raw=False) for line in lines]
    for (_, answer), output in zip(found, engine.generate(prompts, GREEDY), strict=True):
        assert answer["outputs"][0]["text"] == output.outputs[0].text
        assert answer["usage"]["completion_tokens"] == len(output.outputs[0].token_ids)


def test_a_bad_line_has_an_error_and_stops_no_other(engine):
    found = answers(
        engine,
        {"prompt": "x"},
        b"not json",
        b"  ",
        b"\xff",
        b"[1]",
        {"prompt": "x", "images": ["nowhere.png"], "id": "picture"},
        {"prompt": "x", "adapter": "b"},
        {"promt": "x", "sampling": {"temp": 1}},
        {"prompt": "x", "sampling": {"temperature": -1}},
        {"prompt": "x", "messages": []},
        {"prompt": 3, "images": "a.png", "adapter": 1, "sampling": 1},
        {"prompt": "x " * 300},
        {"prompt": "x"},
    )
    assert [number for number, _ in found] == [1, 2, *range(4, 14)]
    errors = [answer.get("error", "") for _, answer in found]
    assert errors[0] == errors[-1] == ""
    wanted = (
        "not JSON",
        "not JSON",
        "a request is an object",
        "nowhere.png",
        "no adapter 'b'; loaded: a",
        "unknown key 'promt'",
        "temperature=-1, want",
        'either "prompt" or "messages"',
        "\"images\" is 'a.png', want a list of paths",
        "the engine holds 256 a request",
    )
    for part, error in zip(wanted, errors[1:-1], strict=True):
        assert part in error
    assert found[4][1]["id"] == "picture"
    assert '"sampling" has no temp; known: n, temperature' in errors[6]


def test_images_go_with_a_prompt_or_into_messages(engine):
    question = {"type": "text", "text": "What?"}
    beside = [{"role": "user", "content": [{"type": "image"}, question]}]
    inside = [{"role": "user", "content": [{"type": "image", "image": "a_wide.png"}, question]}]
    found = answers(
        engine,
        {"prompt": "What?", "images": ["a_wide.png"]},
        {"messages": beside, "images": ["a_wide.png"]},
        {"messages": inside},
        {"messages": inside, "images": ["a_wide.png"]},
        {"messages": beside},
    )
    texts = [answer["outputs"][0]["text"] for _, answer in found[:3]]
    assert len(set(texts)) == 1
    assert "put them all in one place" in found[3][1]["error"]
    assert "1 image placeholders" in found[4][1]["error"]


def test_a_line_names_its_adapter_or_gets_the_default(engine):
    lines = [{"prompt": "x"}, {"prompt": "x", "adapter": "a"}, {"prompt": "x", "adapter": None}]
    assert [a["adapter"] for _, a in answers(engine, *lines)] == [None, "a", None]
    assert [a["adapter"] for _, a in answers(engine, *lines, adapter="a")] == ["a", "a", None]


def test_an_answer_as_json_has_log_probabilities_where_asked_for(engine):
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=1, prompt_logprobs=1)
    output = engine.generate("Hello there", params, show_progress=False)[0]
    answer = json.loads(json.dumps(answer_of(output)))
    assert len(answer["outputs"][0]["logprobs"]) == 2
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_raw_prompts_bypass_the_template(engine):
    (_, chat), (_, raw) = answers(engine, {"prompt": "x"}) + answers(
        engine, {"prompt": "x"}, raw=True
    )
    assert raw["usage"]["prompt_tokens"] < chat["usage"]["prompt_tokens"]
