import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tests.engine.engines import GOLDENS
from valora_jax.engine.answer import Answer, PromptScores
from valora_jax.engine.outputs import Logprob
from valora_jax.engine.sampler import Logprobs, Sampled
from valora_jax.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from valora_jax.media.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(GOLDENS / "checkpoints" / "llava15-tiny")
END, BYTE_A = 2, 3 + ord("a")
VISIBLE = [i for i in range(3, TOKENIZER.vocab_size) if i not in TOKENIZER.special_ids]


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def answer_of(limit: int = 100, **params) -> Answer:
    return Answer(
        SamplingParams(max_tokens=None, **params),
        index=0,
        tokenizer=TOKENIZER,
        end_tokens=[END],
        limit=limit,
    )


def rows_of(tokens: list[int]) -> Sampled:
    """Rows as a step samples them; the k-th likeliest token of every row is 10 + k."""
    S = len(tokens)
    return Sampled(
        token_S=np.array(tokens, np.int32),
        logprobs=Logprobs(
            logprob_S=-1.0 - np.arange(S, dtype=np.float32),
            rank_S=np.full(S, 30, np.int32),
            top_token_SK=np.tile(10 + np.arange(MAX_LOGPROBS, dtype=np.int32), (S, 1)),
            top_logprob_SK=np.tile(-0.1 * np.arange(MAX_LOGPROBS, dtype=np.float32), (S, 1)),
        ),
    )


def feed(answer: Answer, tokens: list[int]) -> str | None:
    """Adds tokens until one ends the answer; returns why."""
    sampled = rows_of(tokens)
    for row in range(len(tokens)):
        if (reason := answer.add(sampled, row)) is not None:
            return reason
    return None


def test_the_end_token_ends_the_answer_and_shows_nowhere_but_in_the_ids():
    answer, ids = answer_of(), ids_of("The red car")
    assert feed(answer, [*ids, END, *ids]) == "stop"
    output = answer.output()
    assert (output.text, list(output.token_ids)) == ("The red car", [*ids, END])
    assert (output.finish_reason, output.stop_reason, output.logprobs) == ("stop", None, None)


def test_ignoring_it_goes_on_to_the_limit():
    answer, ids = answer_of(limit=7, ignore_eos=True), ids_of("The red car")
    assert feed(answer, [*ids, END, *ids]) == "length"
    assert answer.output().text == TOKENIZER.decode([*ids, END, *ids][:7])


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_named_and_shown_only_if_asked_for(include):
    ids = ids_of("The red car")
    answer = answer_of(stop_token_ids=ids[-1:], include_stop_str_in_output=include)
    assert feed(answer, ids) == "stop"
    output = answer.output()
    assert (output.stop_reason, list(output.token_ids)) == (ids[-1], ids)
    assert output.text == TOKENIZER.decode(ids if include else ids[:-1])


@pytest.mark.parametrize(("include", "text"), [(False, "The red "), (True, "The red car s")])
def test_a_stop_string_cuts_within_a_token(include, text):
    answer = answer_of(stop=["blue", "car s"], include_stop_str_in_output=include)
    assert feed(answer, ids_of("The red car stops here")) == "stop"
    output = answer.output()
    assert (output.text, output.stop_reason) == (text, "car s")
    assert len(output.token_ids) < len(ids_of("The red car stops here"))


def test_special_tokens_show_if_asked_for():
    ids = [1, *ids_of("car")]
    shown, hidden = answer_of(skip_special_tokens=False), answer_of()
    for answer in (shown, hidden):
        feed(answer, ids)
        answer.end("abort")
    assert (shown.output().text, hidden.output().text) == ("<s> car", "car")


def test_nothing_ends_an_answer_before_its_least_tokens():
    ids = ids_of("stop stop stop")
    (first,) = {*ids[:1]}
    answer = answer_of(min_tokens=len(ids) + 1, stop=["stop"], stop_token_ids=[first])
    assert feed(answer, ids) is None
    assert answer.output().text == "stop stop stop"
    assert feed(answer, [END]) == "stop"


def test_what_was_held_back_for_a_stop_string_comes_when_the_answer_ends():
    answer = answer_of(stop=["car stops"])
    feed(answer, ids_of("The red car"))
    assert answer.output().text == "The red "
    assert answer.end("abort") == "abort"
    assert (answer.output().text, answer.output().finish_reason) == ("The red car", "abort")


def test_a_stop_string_that_only_the_end_completes_is_a_stop():
    answer = answer_of(limit=1, stop=["a"])  # a byte waits for what may follow it
    assert feed(answer, [BYTE_A]) == "stop"
    output = answer.output()
    assert (output.text, output.finish_reason, output.stop_reason) == ("", "stop", "a")


def test_logprobs_hold_the_likeliest_and_the_taken_by_id():
    answer = answer_of(logprobs=2)
    feed(answer, [11, 99])
    output = answer.output()
    assert output.cumulative_logprob == pytest.approx(-3)
    first, second = output.logprobs or ()
    assert list(first) == [11, 10]
    assert list(second) == [99, 10, 11]
    assert second[99] == Logprob(logprob=-2.0, rank=30, decoded_token=TOKENIZER.token_text(99))
    assert second[10].rank == 1
    assert second[11].logprob == pytest.approx(-0.1)


def test_no_likeliest_means_the_taken_alone():
    answer = answer_of(logprobs=0)
    feed(answer, [50])
    assert [list(each) for each in answer.output().logprobs or ()] == [[50]]


@hypothesis.given(
    tokens=st.lists(st.sampled_from(VISIBLE), max_size=30),
    bounds=st.tuples(st.integers(0, 40), st.integers(1, 6)),
)
def test_the_text_ends_before_the_first_stop_string_and_never_takes_back(tokens, bounds):
    whole = TOKENIZER.decode(tokens)
    start, length = bounds
    stop = whole[start : start + length]
    answer, shown = answer_of(stop=[stop] if stop else None), [""]
    sampled = rows_of(tokens)
    for row in range(len(tokens)):
        reason = answer.add(sampled, row)
        shown.append(answer.output().text)
        if reason is not None:
            break
    if answer.finish_reason is None:
        answer.end("length")
        shown.append(answer.output().text)
    if "\ufffd" not in whole:
        assert answer.output().text == (whole.split(stop)[0] if stop else whole)
        assert answer.output().finish_reason == ("stop" if stop else "length")
    assert all(b.startswith(a) for a, b in itertools.pairwise(shown))


@hypothesis.given(data=st.data())
def test_scores_come_once_a_prompt_token_however_often_chunks_are_computed(data):
    """A preempted request computes its prompt again, in other chunks."""
    tokens = data.draw(st.integers(1, 12))
    scores = PromptScores(tokens=tokens, keep_logits=True, number=1)
    runs = data.draw(st.integers(1, 3))
    for run in range(runs):
        position = 0
        # The last run goes on into the answer; those before are cut off anywhere.
        stop = tokens + 2 if run == runs - 1 else data.draw(st.integers(0, tokens))
        while position < stop:
            length = data.draw(st.integers(1, stop - position))
            row = data.draw(st.integers(0, 3))
            # Row i of the chunk is position + i: its logits say so, and so does what follows it.
            positions = np.arange(position - row, position + length)
            scores.add(
                positions[:, None].astype(np.float32),
                rows_of((positions + 1 + row).tolist()),
                row=row,
                position=position,
                length=length,
                tokenizer=TOKENIZER,
            )
            position += length
    np.testing.assert_array_equal(np.concatenate(scores.logits)[:, 0], np.arange(tokens))
    assert scores.logprobs[0] is None
    assert len(scores.logprobs) == tokens
