"""Random traffic gives every request the answer that it gets alone, and leaves nothing behind."""

import dataclasses
import functools
import random
from collections.abc import Generator

import pytest

from tests.engine.engines import (
    ADAPTERS,
    answer,
    assert_nothing_is_held,
    engine_of,
    load,
    with_images,
)
from tests.fixed_policy import Fixed, Restless, ruled_by
from valora_jax.engine.outputs import RequestOutput
from valora_jax.engine.rounds import EVERYBODY_UNMERGED
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.mode import Mode

REQUESTS, MOST_TOKENS, MOST_AT_ONCE = 200, 60, 24
# Ranks 4 to 64 in more versions than there are slots; three of them change the tower or projector.
NAMES = [
    "a01_attn_lm_r8",
    "a02_attn_suffix_r4",
    "a04_all_linear_r4",
    "a05_vision_proj_r8",
    "a06_qv_r64",
]
PREFIXES = ["USER: ", "You are asked about pictures; answer in few words. USER: "]
TAILS = ["Hi", "What is it?", "Which is larger? ASSISTANT:"]
# Where two tokens are as close as this, the order of float32 sums decides between them.
TIE = 4e-4


@dataclasses.dataclass(frozen=True)
class Asked:
    prefix: str
    images: tuple[int, ...]
    tail: str
    adapter: str | None

    @property
    def prompt(self) -> dict:
        pictures = with_images(self.tail, *self.images)
        return pictures | {"prompt": self.prefix + pictures["prompt"]}


@functools.cache
def alone(asked: Asked) -> tuple[list[int], int]:
    """The greedy tokens in an engine without other requests, and how many are no tie."""
    engine = engine_of(prefix_cache=False)
    load(engine, *NAMES)
    got = answer(engine, asked.prompt, adapter=asked.adapter, max_tokens=MOST_TOKENS, logprobs=2)
    clear = 0
    for likeliest in got.logprobs or ():
        first, second = sorted((each.logprob for each in likeliest.values()), reverse=True)[:2]
        if first - second < TIE:
            break
        clear += 1
    return list(got.token_ids), clear


def random_requests(rng: random.Random) -> list[Asked]:
    """Few prompts, which adapters have in common, so that much can be shared."""

    def prompt() -> tuple[str, tuple[int, ...], str]:
        images = rng.sample(range(5), rng.choice([0, 1, 1, 2]))
        return rng.choice(PREFIXES), tuple(images), rng.choice(TAILS)

    prompts = [prompt() for _ in range(10)]
    adapters = [None, None, *NAMES]
    return [Asked(*rng.choice(prompts), rng.choice(adapters)) for _ in range(REQUESTS)]


class Traffic:
    """Streams that come, grow and go in random order."""

    def __init__(self, rng: random.Random):
        # Pages for two of the four requests that may run.
        self.engine, self.rng = engine_of(kv_pages=14), rng
        load(self.engine, *NAMES)
        self.live: list[tuple[Asked, int, Generator[RequestOutput, None, None]]] = []
        self.compared = self.preempted = self.cached = self.aborted = 0

    def run(self) -> None:
        coming = random_requests(self.rng)
        while coming or self.live:
            if coming and len(self.live) < MOST_AT_ONCE and self.rng.random() < 0.4:
                self.come(coming.pop())
            elif self.live:
                self.follow(self.rng.randrange(len(self.live)))

    def come(self, asked: Asked) -> None:
        if self.rng.random() < 0.05:  # those who run finish on the version that they have
            name = self.rng.choice(NAMES)
            self.engine.load_adapter(name, ADAPTERS / name)
        max_tokens = self.rng.randint(1, MOST_TOKENS)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        stream = self.engine.stream(asked.prompt, params, adapter=asked.adapter)
        self.live.append((asked, max_tokens, stream))

    def follow(self, index: int) -> None:
        asked, max_tokens, stream = self.live[index]
        if self.rng.random() < 0.04:
            stream.close()
            self.aborted += 1
            del self.live[index]
            return
        output = next(stream)
        if self.rng.random() < 0.04:
            self.engine.abort(output.request_id)
            self.aborted += not output.finished
            *_, output = [output, *stream]
        self.check(asked, max_tokens, output)
        if output.finished:
            assert list(stream) == []
            del self.live[index]

    def check(self, asked: Asked, max_tokens: int, output: RequestOutput) -> None:
        tokens_alone, clear = alone(asked)
        tokens = list(output.outputs[0].token_ids)
        assert tokens[:clear] == tokens_alone[:clear][: len(tokens)]
        if not output.finished:
            return
        if output.outputs[0].finish_reason != "abort":
            assert len(tokens) == max_tokens
        self.compared += min(len(tokens), clear)
        self.preempted += output.metrics.preemptions
        self.cached += output.metrics.cached_tokens


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Fixed(EVERYBODY_UNMERGED), Restless()], ids=["unmerged", "all"])
def test_random_traffic_answers_as_each_request_alone_and_leaves_nothing(policy):
    traffic = Traffic(random.Random(0))
    tokens = traffic.engine.parts.core.modes.tokens
    tokens.clear()
    with ruled_by(traffic.engine, policy):
        traffic.run()
    assert_nothing_is_held()
    modes = {Mode.UNMERGED} if isinstance(policy, Fixed) else set(Mode)
    assert {mode for mode in Mode if tokens[mode] > 100} == modes
    assert traffic.compared > 0.8 * REQUESTS * MOST_TOKENS / 2
    assert traffic.preempted > 10
    assert traffic.cached > 500
    assert traffic.aborted > 5
