import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from valora_jax.engine.sampler import (
    MAX_BANNED,
    MAX_LOGPROBS,
    Sampled,
    SamplerState,
    sample,
    sample_likeliest,
    token_logprobs,
    wants_only_likeliest,
)

run = jax.jit(sample)
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


def rows_of(S: int, V: int, **settings) -> dict[str, np.ndarray]:
    """Settings of S rows, greedy by default; one value stands for all rows."""
    integers = dict(state_row=np.arange(S), seed=np.arange(S), step=0, top_k=0)
    floats = dict(temperature=0, top_p=1, min_p=0) | dict.fromkeys(PENALTIES, 0)
    floats["repetition_penalty"] = 1
    rows = {name: np.full(S, settings.get(name, x), np.int32) for name, x in integers.items()}
    rows |= {name: np.full(S, settings.get(name, x), np.float32) for name, x in floats.items()}
    rows["banned"] = np.full((S, MAX_BANNED), V, np.int32)
    for row, tokens in settings.get("banned", {}).items():
        rows["banned"][row, : len(tokens)] = tokens
    rows["wants_logprobs"] = np.int32(settings.get("wants_logprobs", 0))
    return rows


def sampled(logits_SV: np.ndarray, **settings) -> Sampled:
    S, V = logits_SV.shape
    state = SamplerState.empty(max_requests=S, vocab_rows=V)
    return run(np.float32(logits_SV), state, rows_of(S, V, **settings))[0].to_numpy()


def same_rows(logits_V, rows: int) -> np.ndarray:
    return np.tile(np.float32(logits_V), (rows, 1))


def random_logits(S: int, V: int) -> np.ndarray:
    return np.random.default_rng(S * V).normal(scale=2, size=(S, V)).astype(np.float32)


def test_greedy_takes_the_likeliest_and_of_equals_the_first():
    logits_SV = np.float32([[0, 3, 1, 2], [-1, -5, -1, -9], [2, 2, 2, 2]])
    assert sampled(logits_SV).token_S.tolist() == [1, 0, 0]


def test_rows_that_want_only_the_likeliest_get_the_same_without_conditions():
    logits_SV, rows = random_logits(4, 9), rows_of(4, 9, state_row=[2, 0, 4, 1])
    assert wants_only_likeliest(rows, vocab_rows=9)
    state = SamplerState.empty(max_requests=4, vocab_rows=9)
    want, after = run(logits_SV, state, rows)
    got, lean_after = jax.jit(sample_likeliest)(logits_SV, state, rows["state_row"])
    np.testing.assert_array_equal(got.token_S, want.token_S)
    assert got.logprobs is None
    np.testing.assert_array_equal(lean_after.last_token_R, after.last_token_R)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=[0, 0.5, 0]),
        dict(presence_penalty=[0, 0, 1]),
        dict(frequency_penalty=[0.1, 0, 0]),
        dict(repetition_penalty=[1, 1.5, 1]),
        dict(banned={1: [3]}),
        dict(wants_logprobs=1),
    ],
)
def test_a_single_row_that_wants_more_is_noticed(settings):
    assert not wants_only_likeliest(rows_of(3, 9, **settings), vocab_rows=9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_draws_have_the_distribution_of_the_softmax(temperature):
    S, logits_V = 20_000, np.array([1.0, 0.0, -1.0, 2.0, 0.5, -3.0])
    tokens_S = sampled(same_rows(logits_V, S), temperature=temperature).token_S
    weights_V = np.exp(logits_V / temperature)
    want_V = S * weights_V / weights_V.sum()
    chi_squared = ((np.bincount(tokens_S, minlength=6) - want_V) ** 2 / want_V).sum()
    assert chi_squared < 20.5  # exceeded once in 1000 seeds, of 5 degrees of freedom


def test_steps_of_one_seed_are_independent_draws():
    S = 20_000
    rows = dict(seed=7, step=np.arange(S), temperature=1.0)
    tokens_S = sampled(np.zeros((S, 4)), **rows).token_S
    pairs_44 = np.histogram2d(tokens_S[:-1], tokens_S[1:], bins=4)[0]
    assert (((pairs_44 - S / 16) ** 2) / (S / 16)).sum() < 37.7  # 15 degrees of freedom, 1 in 1000


def admitted(logits_V, *, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that remain after top-k, top-p and min-p, by sorting; equals stay together."""
    x_V = np.float64(logits_V)
    if top_k:
        x_V = np.where(x_V >= np.sort(x_V)[::-1][min(top_k, len(x_V)) - 1], x_V, -np.inf)
    prob_V = np.exp(x_V) / np.exp(x_V).sum()
    descending_V = np.sort(prob_V)[::-1]
    reached_V = np.cumsum(descending_V) >= top_p
    hypothesis.assume(np.abs(np.cumsum(descending_V) - top_p).min() > 1e-5 or top_p == 1)
    keep_V = prob_V >= (descending_V[reached_V.argmax()] if top_p < 1 else 0)
    hypothesis.assume(np.abs(prob_V / prob_V.max() - min_p).min() > 1e-5)
    return set(np.flatnonzero(keep_V & (prob_V > 0) & (prob_V >= min_p * prob_V.max())))


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    quarters=st.lists(st.integers(-4, 4), min_size=10, max_size=10),
    top_k=st.sampled_from([0, 1, 2, 3, 5, 9, 10, 50]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
)
def test_filters_admit_exactly_what_sorting_admits(quarters, top_k, top_p, min_p):
    logits_V = np.array(quarters) / 4
    want = admitted(logits_V, top_k=top_k, top_p=top_p, min_p=min_p)
    settings = dict(top_k=top_k, top_p=top_p, min_p=min_p, temperature=1.0)
    # Each token has a probability above 1%: in 2048 draws all that are admitted come up.
    assert set(sampled(same_rows(logits_V, 2048), **settings).token_S) == want


def test_filters_apply_after_the_temperature_and_top_k_before_top_p():
    logits_V = np.log([0.4, 0.3, 0.2, 0.1])
    cases = {
        (1.0, 0, 0.6): {0, 1},
        (1.0, 2, 0.55): {0},  # of the two that top-k leaves, the first has 4/7
        (0.25, 0, 0.7): {0},
        (5.0, 0, 0.7): {0, 1, 2},
    }
    for (temperature, top_k, top_p), want in cases.items():
        settings = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        assert set(sampled(same_rows(logits_V, 2048), **settings).token_S) == want


def test_rows_of_one_batch_keep_to_their_own_settings():
    S, V = 4096, 6
    kind_S = np.arange(S) % 4  # greedy, top-k, min-p, top-p
    tokens_S = sampled(
        same_rows([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], S),
        temperature=np.where(kind_S == 0, 0, 1),
        top_k=np.where(kind_S == 1, 2, 0),
        min_p=np.where(kind_S == 2, np.exp(-0.25), 0),
        top_p=np.where(kind_S == 3, 0.7, 1),
    ).token_S
    seen = [set(tokens_S[kind_S == kind].tolist()) for kind in range(4)]
    assert seen == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]
    assert len(set(sampled(np.zeros((S, V)), temperature=1.0).token_S)) == V


def test_penalties_are_vllms_formulas():
    S, V, rng = 512, 16, np.random.default_rng(0)
    count_SV = rng.integers(0, 3, (S, V)) * (rng.random((S, V)) < 0.5)
    in_prompt_SV = rng.random((S, V)) < 0.3
    presence_S, frequency_S = rng.uniform(-2, 2, (2, S)).astype(np.float32)
    repetition_S = rng.uniform(0.5, 2, S).astype(np.float32)
    logits_SV = random_logits(S, V)
    seen_SV = in_prompt_SV | (count_SV > 0)
    factor_SV = np.where(logits_SV > 0, 1 / repetition_S[:, None], repetition_S[:, None])
    want_SV = np.where(seen_SV, logits_SV * factor_SV, logits_SV)
    want_SV = want_SV - frequency_S[:, None] * count_SV - presence_S[:, None] * (count_SV > 0)
    state = SamplerState.empty(max_requests=S, vocab_rows=V)
    for row in range(S):  # rows of the state in another order than those of the batch
        state = set_counts(state, (row + 1) % S, np.int32(count_SV[row]), in_prompt_SV[row])
    penalties = dict(zip(PENALTIES, (presence_S, frequency_S, repetition_S), strict=True))
    rows = rows_of(S, V, state_row=np.roll(np.arange(S), -1), **penalties)
    got, after = run(logits_SV, state, rows)
    np.testing.assert_array_equal(got.token_S, want_SV.argmax(-1))
    assert (want_SV.argmax(-1) != logits_SV.argmax(-1)).mean() > 0.3
    np.testing.assert_array_equal(
        np.roll(after.output_count_RV[:S], -1, axis=0), count_SV + np.eye(V)[got.token_S]
    )
    np.testing.assert_array_equal(after.last_token_R[rows["state_row"]], got.token_S)


set_counts = jax.jit(SamplerState.with_counts)


def test_a_frequency_penalty_lets_no_token_come_twice_in_a_row():
    V = 5
    state = set_counts(
        SamplerState.empty(max_requests=1, vocab_rows=V), 0, np.zeros(V, np.int32), np.ones(V, bool)
    )
    tokens = []
    for step in range(10):
        rows = rows_of(1, V, step=step, frequency_penalty=2.0)
        got, state = run(np.float32([[0.1, 0.2, 0.3, 0.4, 0.5]]), state, rows)
        tokens += np.asarray(got.token_S).tolist()
    assert tokens == [4, 3, 2, 1, 0] * 2


def test_banned_tokens_never_come_and_the_others_as_before():
    logits_SV = same_rows([5, 4, 3, 2], 64)
    banned = {row: [0, 1] for row in range(32)}
    assert set(sampled(logits_SV, banned=banned).token_S[:32]) == {2}
    assert set(sampled(logits_SV, banned=banned).token_S[32:]) == {0}
    drawn_S = sampled(logits_SV, banned=banned, temperature=2.0).token_S
    assert set(drawn_S[:32]) == {2, 3}
    np.testing.assert_array_equal(drawn_S[32:], sampled(logits_SV, temperature=2.0).token_S[32:])


def log_softmax(logits_SV) -> np.ndarray:
    x_SV = np.float64(logits_SV)
    return x_SV - np.log(np.exp(x_SV).sum(-1, keepdims=True))


def test_logprobs_are_the_models_own_whatever_the_sampling():
    S, V = 8, 50
    logits_SV = random_logits(S, V)
    settings = dict(temperature=0.3, top_k=3, banned={0: [1, 2]}, wants_logprobs=1)
    taken, want_SV = sampled(logits_SV, **settings), log_softmax(logits_SV)
    got, taken_SV = taken.logprobs, want_SV[np.arange(S), taken.token_S]
    order_SV = np.argsort(-want_SV, axis=-1)
    np.testing.assert_array_equal(got.top_token_SK, order_SV[:, :MAX_LOGPROBS])
    np.testing.assert_allclose(
        got.top_logprob_SK, np.take_along_axis(want_SV, got.top_token_SK, 1), atol=1e-5
    )
    np.testing.assert_allclose(got.logprob_S, taken_SV, atol=1e-5)
    np.testing.assert_array_equal(got.rank_S, 1 + (want_SV > taken_SV[:, None]).sum(-1))


def test_nobody_pays_for_logprobs_that_nobody_wants():
    got = sampled(random_logits(3, 40)).logprobs
    assert not got.top_logprob_SK.any()
    assert not got.logprob_S.any()


def test_a_small_vocabulary_fills_the_likeliest_up_with_its_last():
    got = jax.jit(token_logprobs)(np.float32([[1, 3, 2]]), np.array([0])).to_numpy().logprobs
    assert got.top_token_SK[0].tolist() == [1, 2, 0] + [0] * (MAX_LOGPROBS - 3)
    assert got.rank_S.tolist() == [3]


ROWS = st.fixed_dictionaries(
    dict(
        seed=st.integers(-(2**31), 2**31 - 1),
        step=st.integers(0, 1000),
        temperature=st.sampled_from([0.0, 0.5, 1.0]),
        top_k=st.sampled_from([0, 3]),
        top_p=st.sampled_from([0.5, 1.0]),
        min_p=st.sampled_from([0.0, 0.2]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
    )
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(batch=st.lists(ROWS, min_size=6, max_size=6), place=st.integers(0, 5))
def test_a_row_gets_the_same_token_whatever_the_others_want(batch, place):
    logits_SV = random_logits(6, 12)

    def token_at(place: int, batch: list[dict]) -> int:
        order = np.roll(np.arange(6), place)  # where the row lies in batch and state
        columns = {name: np.array([row[name] for row in batch])[order] for name in batch[0]}
        columns["state_row"] = np.arange(6)
        return sampled(logits_SV[order], **columns).token_S[place]

    neutral = dict(seed=0, step=0, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1)
    alone = token_at(0, [batch[0]] + [neutral] * 5)
    assert token_at(place, batch) == alone


def test_rows_of_padding_change_nothing_but_the_last_row_of_the_state():
    S, V = 3, 9
    logits_SV, state = random_logits(S, V), SamplerState.empty(max_requests=S, vocab_rows=V)
    settings = dict(temperature=1.0, seed=5, step=np.arange(S))
    alone, after_alone = run(logits_SV, state, rows_of(S, V, **settings))
    padded = {
        name: np.concatenate([column, padding]) if column.ndim else column
        for (name, column), padding in zip(
            rows_of(S, V, **settings).items(),
            rows_of(S, V, state_row=S).values(),
            strict=True,
        )
    }
    both, after_both = run(np.tile(logits_SV, (2, 1)), state, padded)
    np.testing.assert_array_equal(both.token_S[:S], alone.token_S)
    for a, b in zip(*map(jax.tree.leaves, (after_alone, after_both)), strict=True):
        np.testing.assert_array_equal(a[:S], b[:S])


def test_settings_at_their_bounds_still_give_a_token():
    logits_SV = random_logits(5, 7)
    columns = dict(
        temperature=[1e-5, 3.4e38, 1, 1, 1],
        top_k=[0, 0, 2**31 - 1, 1, 0],
        top_p=[1, 1, 1, 1e-9, 1e-30],
        min_p=[0, 0, 1, 0, 1e-38],
    )
    tokens_S = sampled(logits_SV, **columns).token_S
    likeliest_S = logits_SV.argmax(-1)
    assert tokens_S[[0, 2, 3, 4]].tolist() == likeliest_S[[0, 2, 3, 4]].tolist()
    assert 0 <= tokens_S[1] < 7
