import dataclasses
import math

import pytest

from valora_jax.engine.sampling_params import SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (True, False)


BAD = {
    "n": [0, -1, 1.0, True, None],
    "temperature": [-0.1, math.nan, math.inf, "1", None, True, 10**400],
    "top_p": [0, 1.1, math.nan],
    "top_k": [-2, 1.5, 2**31],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, math.inf],
    "seed": [1.0, False, 2**63, 10**400],
    "stop": ["", [""], [1], 3, b"x", ["a", None]],
    "stop_token_ids": [[-1], [True], [1.0], "12", 7],
    "ignore_eos": [1, None],
    "max_tokens": [0, -1, 1.5, True],
    "min_tokens": [-1, 17, None],
    "logprobs": [-1, 21, True],
    "prompt_logprobs": [-1, 21],
    "skip_special_tokens": [0],
    "include_stop_str_in_output": ["yes"],
}


def test_every_field_is_checked():
    assert BAD.keys() == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"\n  {field}=.* (want|exceeds) "):
        SamplingParams(**{field: value})


EDGES = [
    dict(temperature=0),
    dict(top_p=1),
    dict(top_k=2**31 - 1),
    dict(min_p=1),
    dict(presence_penalty=-2, frequency_penalty=2),
    dict(seed=-(2**63)),
    dict(max_tokens=None, min_tokens=1000),
    dict(max_tokens=5, min_tokens=5),
    dict(logprobs=0, prompt_logprobs=20),
    dict(stop=None, stop_token_ids=None),
]


@pytest.mark.parametrize("fields", EDGES, ids=str)
def test_the_edges_are_allowed(fields):
    SamplingParams(**fields)


def test_all_faults_are_listed_at_once():
    with pytest.raises(ValueError, match="the sampling parameters are wrong") as error:
        SamplingParams(temperature=-1, top_p=2, stop="", max_tokens=True)
    for part in (
        "temperature=-1, want a number >= 0 and <= ",
        "top_p=2, want a number > 0 and <= 1",
        "stop='', want a non-empty string",
        "max_tokens=True, want an integer >= 1",
    ):
        assert part in str(error.value)


def test_equal_greedy_answers_are_refused():
    with pytest.raises(ValueError, match="n=2 greedy answers would be equal; set n=1"):
        SamplingParams(n=2, temperature=0)


def test_stops_and_top_k_are_stored_in_one_form():
    assert SamplingParams(stop="END").stop_strings == ("END",)
    stops = ["a", "b"]
    params = SamplingParams(stop=stops, stop_token_ids=[3], top_k=-1)
    stops.append("c")
    assert params.stop_strings == ("a", "b")
    assert params.stop_token_ids == (3,)
    assert params.top_k == 0
    assert SamplingParams().stop_strings == ()


def test_a_vanishing_temperature_is_greedy():
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_the_first_sample_is_what_n_1_gives_and_the_others_have_seeds_of_their_own():
    params = SamplingParams(n=4, seed=7, top_k=5, stop="x")
    samples = [params.for_sample(i) for i in range(4)]
    assert samples[0] == SamplingParams(n=1, seed=7, top_k=5, stop="x")
    assert all(s.n == 1 and s.stop_strings == ("x",) for s in samples)
    next_seed = SamplingParams(n=4, seed=8)
    seeds = {s.seed for s in samples} | {next_seed.for_sample(i).seed for i in range(4)}
    assert len(seeds) == 8
    assert samples == [params.for_sample(i) for i in range(4)]


def test_samples_without_a_seed_stay_without():
    assert SamplingParams(n=2).for_sample(1).seed is None


def test_a_sample_beyond_n_is_refused():
    with pytest.raises(ValueError, match="index=2 of n=2"):
        SamplingParams(n=2).for_sample(2)
