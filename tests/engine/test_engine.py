import dataclasses
import gc
import itertools
import threading

import numpy as np
import pytest

from tests.engine.engines import (
    CONFIG,
    answer,
    assert_nothing_is_held,
    engine_of,
    image,
    load,
    with_images,
)
from valora_jax.engine.outputs import RequestOutput
from valora_jax.engine.sampling_params import SamplingParams

QUESTION = "USER: Which sign is closer? ASSISTANT:"
LORA, VISION = "a03_all_linear_lm_r16", "a05_vision_proj_r8"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
# Float32 sums in another order; log-probabilities reach -20.
TOLERANCE = 5e-4


pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def engine():
    engine = engine_of()
    load(engine, LORA, VISION)
    return engine


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    exp_TV = np.exp(np.float64(logits_TV) - logits_TV.max(-1, keepdims=True))
    return np.log(exp_TV / exp_TV.sum(-1, keepdims=True))


MIXED = [
    (QUESTION, None, dict(temperature=1.0, seed=1)),
    (with_images("Describe it.", 0), None, dict(temperature=0.7, seed=2, top_p=0.9)),
    (with_images("Describe it.", 0), VISION, dict(temperature=0.7, seed=2, top_p=0.9)),
    (QUESTION, LORA, dict(temperature=1.5, seed=-3, top_k=20, logprobs=3)),
    (with_images("Compare.", 1, 0), LORA, dict(temperature=1.0, seed=2**40, min_p=0.05)),
    ("Hi", None, dict(temperature=0.8, seed=5, presence_penalty=1.0, repetition_penalty=1.3)),
    ("Hi", LORA, dict(temperature=0, frequency_penalty=0.7, prompt_logprobs=1)),
    (QUESTION * 3, None, dict(temperature=1.0, seed=1, min_tokens=9, stop_token_ids=[9])),
]


def run_mixed(engine, order) -> list[list[int]]:
    prompts, adapters, params = zip(*(MIXED[i] for i in order), strict=True)
    sampling = [SamplingParams(max_tokens=12, **each) for each in params]
    outputs = engine.generate(list(prompts), sampling, adapter=list(adapters))
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_seeded_request_gets_the_same_tokens_alone_and_in_any_batch(engine):
    alone = [run_mixed(engine, [i])[0] for i in range(len(MIXED))]
    assert len({tuple(tokens) for tokens in alone}) == len(MIXED)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(MIXED)).tolist()
        assert run_mixed(engine, order) == [alone[i] for i in order]


def test_each_of_n_answers_is_the_one_of_its_own_seed(engine):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    (output,) = engine.generate(with_images("What?", 2), params)
    assert [each.index for each in output.outputs] == [0, 1, 2]
    answers = tokens_of([output])[0]
    assert len({tuple(each) for each in answers}) == 3
    alone = [params.for_sample(i) for i in range(3)]
    assert alone[0].seed == 5
    assert tokens_of(engine.generate([with_images("What?", 2)] * 3, alone)) == [
        [each] for each in answers
    ]


def test_without_a_seed_answers_differ(engine):
    params = SamplingParams(temperature=1.0, max_tokens=12)
    outputs = engine.generate([QUESTION] * 3, params)
    assert len({tuple(tokens) for (tokens,) in tokens_of(outputs)}) == 3


def test_outputs_come_in_the_order_of_the_prompts_with_their_prompts(engine):
    prompts = [QUESTION, with_images("x", 0), {"prompt_token_ids": [1, 5, 6]}]
    outputs = engine.generate(prompts * 3, GREEDY)
    assert [output.prompt for output in outputs] == [QUESTION, "<image>x", None] * 3
    spec = engine.parts.spec
    for output in outputs[1::3]:
        assert output.prompt_token_ids.count(spec.image_token_id) == spec.tokens_per_image
    assert list(outputs[2].prompt_token_ids) == [1, 5, 6]
    assert all(output.finished for output in outputs)
    assert tokens_of(outputs[:3]) == tokens_of(outputs[3:6]) == tokens_of(outputs[6:])
    assert engine.generate([], GREEDY) == []


def test_greedy_text_is_cut_by_stop_strings(engine):
    whole = answer(engine, QUESTION, max_tokens=40)
    stop = whole.text[20:24]
    start = whole.text.index(stop)
    for include in (False, True):
        cut = answer(engine, QUESTION, max_tokens=40, stop=stop, include_stop_str_in_output=include)
        assert cut.text == whole.text[: start + include * len(stop)]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        assert list(cut.token_ids) == list(whole.token_ids)[: len(cut.token_ids)]
        assert len(cut.token_ids) < 40


def test_stop_tokens_end_an_answer_but_not_before_its_least_tokens(engine):
    whole = list(answer(engine, QUESTION, max_tokens=20).token_ids)
    stop = whole[4]
    first = whole.index(stop)
    cut = answer(engine, QUESTION, max_tokens=20, stop_token_ids=[stop])
    assert (list(cut.token_ids), cut.stop_reason) == (whole[: first + 1], stop)
    later = answer(engine, QUESTION, max_tokens=20, stop_token_ids=[stop], min_tokens=12)
    assert list(later.token_ids)[:first] == whole[:first]
    assert stop not in list(later.token_ids)[:12]
    assert len(later.token_ids) >= 12


def test_the_end_token_ends_an_answer_unless_ignored(engine):
    (end,) = engine.parts.tokenizer.stop_token_ids
    prompt = {"prompt_token_ids": [1, 6, end]}
    # The tiny model would never say it; such a penalty has it repeat the prompt.
    params = dict(repetition_penalty=1e-3, max_tokens=10)
    whole = list(answer(engine, prompt, ignore_eos=True, **params).token_ids)
    assert 0 < whole.index(end) < 9
    short = answer(engine, prompt, ignore_eos=False, **params)
    assert list(short.token_ids) == whole[: whole.index(end) + 1]
    assert (short.finish_reason, short.stop_reason) == ("stop", None)
    held = answer(engine, prompt, ignore_eos=False, min_tokens=10, **params)
    assert end not in held.token_ids
    assert len(held.token_ids) == 10


def test_special_tokens_are_in_the_text_only_if_asked_for(engine):
    tokenizer = engine.parts.tokenizer
    prompt = {"prompt_token_ids": [1, 672 - 1, 5]}
    for skip in (True, False):
        got = answer(engine, prompt, max_tokens=60, skip_special_tokens=skip)
        assert got.text == tokenizer.decode(got.token_ids, skip_special_tokens=skip)


def test_no_limit_on_tokens_goes_on_to_the_engines(engine):
    got = answer(engine, QUESTION, max_tokens=None)
    prompt_tokens = len(engine.parts.tokenizer.encode(QUESTION))
    assert prompt_tokens + len(got.token_ids) == CONFIG.max_request_tokens
    assert got.finish_reason == "length"


@pytest.mark.parametrize("adapter", [None, LORA])
def test_logprobs_are_those_of_the_logits(engine, adapter):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=70, logprobs=5, ignore_eos=True)
    (output,) = engine.generate(with_images("Look.", 0), params, adapter=adapter)
    got = output.outputs[0]
    prompt = {
        "prompt_token_ids": [*output.prompt_token_ids, *got.token_ids],
        "multi_modal_data": {"image": image(0)},
    }
    (logits_TV,) = engine.prompt_logits([prompt], adapter=adapter)
    want_NV = log_softmax(logits_TV[len(output.prompt_token_ids) - 1 : -1])
    for token, logprobs, want_V in zip(got.token_ids, got.logprobs or (), want_NV, strict=True):
        assert {*np.argsort(want_V)[-5:]} | {token} == logprobs.keys()
        for each, logprob in logprobs.items():
            assert logprob.logprob == pytest.approx(want_V[each], abs=TOLERANCE)
            assert logprob.rank == 1 + (want_V > want_V[each]).sum()
            assert logprob.decoded_token == engine.parts.tokenizer.token_text(each)
    taken = want_NV[np.arange(70), list(got.token_ids)].sum()
    assert got.cumulative_logprob == pytest.approx(taken, abs=70 * TOLERANCE)


@pytest.mark.parametrize("prompt", ["Hi", with_images("Look. " * 30, 0)], ids=["short", "long"])
def test_prompt_logprobs_are_those_of_the_prompts_logits(engine, prompt):
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    (output,) = engine.generate(prompt, params, adapter=VISION)
    (logits_TV,) = engine.prompt_logits([prompt], adapter=VISION)
    assert len(logits_TV) == len(output.prompt_token_ids)
    assert logits_TV.dtype == np.float32
    first, *logprobs = output.prompt_logprobs or ()
    assert first is None
    following = output.prompt_token_ids[1:]
    for token, got, want_V in zip(following, logprobs, log_softmax(logits_TV[:-1]), strict=True):
        assert got[token].logprob == pytest.approx(want_V[token], abs=TOLERANCE)
        assert {*np.argsort(want_V)[-2:]} | {token} == got.keys()
    assert logits_TV[-1].argmax() == output.outputs[0].token_ids[0]


def test_a_stream_grows_to_what_generate_gives(engine):
    params = SamplingParams(n=2, temperature=1.0, seed=4, max_tokens=15, logprobs=1, stop=["zq"])
    prompt = with_images("Tell.", 1)
    (whole,) = engine.generate(prompt, params, adapter=LORA)
    seen = list(engine.stream(prompt, params, adapter=LORA))
    assert len(seen) >= 15
    for before, after in itertools.pairwise(seen):
        for a, b in zip(before.outputs, after.outputs, strict=True):
            assert b.text.startswith(a.text)
            assert list(b.token_ids)[: len(a.token_ids)] == list(a.token_ids)
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    last = seen[-1]
    assert tokens_of([last]) == tokens_of([whole])
    assert [each.text for each in last.outputs] == [each.text for each in whole.outputs]
    assert last.adapter == whole.adapter


def test_streams_and_generate_share_the_steps(engine):
    want = [answer(engine, QUESTION, max_tokens=30), answer(engine, "Hi", max_tokens=10)]
    params = dataclasses.replace(GREEDY, max_tokens=30)
    stream = engine.stream(QUESTION, params)
    next(stream)
    (other,) = engine.generate("Hi", dataclasses.replace(GREEDY, max_tokens=10))
    *_, last = stream
    assert [last.outputs[0], other.outputs[0]] == want


def test_a_stream_that_others_drove_to_its_end_still_gives_its_answer(engine):
    want = answer(engine, "Hi", max_tokens=4)
    stream = engine.stream("Hi", dataclasses.replace(GREEDY, max_tokens=4))
    answer(engine, QUESTION, max_tokens=30)
    *_, last = stream
    assert last.outputs[0] == want


def test_an_abort_ends_a_stream_with_what_it_has(engine):
    whole = answer(engine, QUESTION, max_tokens=100)
    stream = engine.stream(QUESTION, dataclasses.replace(GREEDY, max_tokens=100))
    outputs = list(itertools.islice(stream, 5))
    engine.abort(outputs[-1].request_id)
    engine.abort(outputs[-1].request_id)
    (last,) = stream
    got = last.outputs[0]
    assert (last.finished, got.finish_reason) == (True, "abort")
    assert whole.text.startswith(got.text)
    assert 5 <= len(got.token_ids) < 20
    engine.abort("no such request")


@pytest.mark.parametrize("outputs", [0, 1, 3])
@pytest.mark.parametrize("how", ["close", "lose"])
def test_a_stream_that_is_closed_or_lost_is_aborted(engine, outputs, how):
    stream = engine.stream(with_images("a", 3), GREEDY, adapter=VISION)
    assert len(list(itertools.islice(stream, outputs))) == outputs
    if how == "close":
        stream.close()
    del stream
    gc.collect()
    assert not engine.parts.core.scheduler.has_work
    assert_nothing_is_held()


def test_threads_share_one_engine(engine):
    prompts = [QUESTION, "Hi", with_images("b", 1), QUESTION * 2]
    want = [answer(engine, prompt, max_tokens=25).token_ids for prompt in prompts]
    params, got = dataclasses.replace(GREEDY, max_tokens=25), {}

    def ask(i: int) -> None:
        (output,) = engine.generate(prompts[i], params)
        got[i] = output.outputs[0].token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [got[i] for i in range(4)] == want


def conversation(*content) -> list[dict]:
    return [{"role": "user", "content": [*content]}]


def test_chat_is_generate_through_the_template(engine):
    picture = {"type": "image", "image": image(0)}
    text = {"type": "text", "text": "What is it?"}
    conversations = [conversation(picture, text), conversation(text)]
    rendered = [
        with_images("", 0) | {"prompt": "USER: <image>\nWhat is it? ASSISTANT:"},
        "USER: What is it? ASSISTANT:",
    ]
    want = tokens_of(engine.generate(rendered, GREEDY, adapter=[LORA, None]))
    assert tokens_of(engine.chat(conversations, GREEDY, adapter=[LORA, None])) == want
    assert tokens_of(engine.chat(conversations[1], GREEDY)) == want[1:]
