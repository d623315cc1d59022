"""Several steps in flight give the tokens of one, whatever happens meanwhile."""

import dataclasses
import random

import pytest

from tests.engine.engines import (
    ADAPTERS,
    answer,
    engine_of,
    load,
    with_images,
)
from valora_jax.engine.engine import Engine
from valora_jax.engine.outputs import CompletionOutput
from valora_jax.engine.sampling_params import SamplingParams

QUESTION = "USER: Which sign is closer? ASSISTANT:"
NAMES = ["a03_all_linear_lm_r16", "a05_vision_proj_r8"]
STEPS_AHEAD, REQUESTS = 4, 120
KINDS = [
    dict(temperature=0),
    dict(temperature=1.0, top_p=0.9),
    dict(temperature=0, repetition_penalty=1.2, frequency_penalty=0.5),
    dict(temperature=0.8, min_tokens=8, logprobs=2),
]


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: dict
    params: SamplingParams
    adapter: str | None


pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def engine():
    """Four steps in flight, and pages for two of the four requests that may run."""
    engine = engine_of(kv_pages=14, steps_ahead=STEPS_AHEAD)
    load(engine, *NAMES)
    return engine


@pytest.fixture
def one_ahead():
    engine = engine_of(steps_ahead=1)
    load(engine, *NAMES)
    return engine


def generate(engine: Engine, asked: list[Asked]) -> list[CompletionOutput]:
    prompts, params, adapters = zip(*((a.prompt, a.params, a.adapter) for a in asked), strict=True)
    outputs = engine.generate(list(prompts), list(params), adapter=list(adapters))
    return [output.outputs[0] for output in outputs]


def random_requests(engine: Engine, rng: random.Random) -> list[Asked]:
    """Every other one is stopped by a token or a string of its own answer."""
    asked = [
        Asked(
            with_images(rng.choice(["Hi", QUESTION, QUESTION * 2]), *rng.choice([(), (1,), (2,)])),
            SamplingParams(seed=i, max_tokens=rng.randint(8, 60), **rng.choice(KINDS)),
            rng.choice([None, *NAMES]),
        )
        for i in range(REQUESTS)
    ]
    for i, whole in enumerate(generate(engine, asked)):
        stop = rng.choice([{}, {}, dict(stop_token_ids=[rng.choice(whole.token_ids)])])
        if len(whole.text) > 8 and rng.random() < 0.25:
            start = rng.randrange(len(whole.text) - 3)
            stop = dict(stop=whole.text[start : start + 3])
        asked[i] = dataclasses.replace(
            asked[i], params=dataclasses.replace(asked[i].params, **stop)
        )
    return asked


class Traffic:
    """Streams that come, grow and are aborted in random order, while adapters are replaced."""

    def __init__(self, engine: Engine, rng: random.Random):
        self.engine, self.rng = engine, rng
        self.answers: dict[int, CompletionOutput] = {}
        self.deepest = self.preempted = self.aborted = 0

    def run(self, asked: list[Asked]) -> None:
        coming, live = list(enumerate(asked)), {}
        while coming or live:
            if coming and len(live) < 4 and self.rng.random() < 0.1:
                i, new = coming.pop()
                live[i] = self.engine.stream(new.prompt, new.params, adapter=new.adapter)
            elif live and self.follow(i := self.rng.choice([*live]), live[i]):
                del live[i]
            self.deepest = max(self.deepest, len(self.engine.parts.core._in_flight))

    def follow(self, i: int, stream) -> bool:
        """Whether it is over."""
        if self.rng.random() < 0.01:
            stream.close()
            self.aborted += 1
            return True
        if self.rng.random() < 0.02:  # those who run finish on the version that they have
            name = self.rng.choice(NAMES)
            self.engine.unload_adapter(name)
            self.engine.load_adapter(name, ADAPTERS / name)
        output = next(stream)
        self.answers[i] = output.outputs[0]
        self.preempted += output.finished and output.metrics.preemptions
        return output.finished


def test_random_traffic_gets_the_answers_of_one_step_in_flight(engine, one_ahead):
    rng = random.Random(0)
    asked = random_requests(one_ahead, rng)
    traffic = Traffic(engine, rng)
    traffic.run(asked)
    want = generate(one_ahead, asked)
    for i, got in traffic.answers.items():
        if got.finish_reason is None:  # aborted
            assert list(got.token_ids) == list(want[i].token_ids)[: len(got.token_ids)]
        else:
            assert (got.token_ids, got.text) == (want[i].token_ids, want[i].text)
            assert (got.finish_reason, got.stop_reason) == (
                want[i].finish_reason,
                want[i].stop_reason,
            )
    assert {answer.finish_reason for answer in traffic.answers.values()} >= {"stop", "length"}
    assert traffic.deepest == STEPS_AHEAD
    assert traffic.preempted > 3
    assert traffic.aborted > 3


def test_a_newcomer_an_abort_and_an_unload_find_steps_in_flight(engine, one_ahead):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    want = [answer(one_ahead, QUESTION, adapter=name, max_tokens=40) for name in (None, *NAMES)]
    engine.load_adapter("name", ADAPTERS / NAMES[0])
    streams = [engine.stream(QUESTION, params, adapter=name) for name in (None, "name")]
    for _ in range(3):
        outputs = [next(stream) for stream in streams]
    assert len(engine.parts.core._in_flight) == STEPS_AHEAD
    engine.abort(outputs[0].request_id)
    engine.unload_adapter("name")
    streams.append(engine.stream(QUESTION, params, adapter=NAMES[1]))
    aborted, *lasts = ([*stream][-1].outputs[0] for stream in streams)
    assert lasts == want[1:]
    assert aborted.finish_reason == "abort"
    assert aborted.token_ids == want[0].token_ids[: len(aborted.token_ids)]
    assert "name" not in {info.ref.name for info in engine.list_adapters()}
