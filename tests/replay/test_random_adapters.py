import numpy as np
import pytest

from valora_jax.models.llava15.config import LLAVA_1_5_7B
from valora_jax.models.llava15.spec import spec_of
from valora_jax.replay.random_adapters import adapter_name, random_adapters

TARGET = spec_of(LLAVA_1_5_7B).adapter_target


def adapters(**changes):
    of = dict(number=3, ranks=(16, 64), targets="all", seed=0)
    return random_adapters(TARGET, **of | changes)


@pytest.fixture(scope="module")
def three():
    return adapters()


def test_ranks_take_turns_on_every_linear_of_the_decoder(three):
    first, second, third = three
    assert [a.name for a in three] == [adapter_name(i) for i in range(3)]
    assert first.bound() == "decoder q, k, v, o, gate, up, down of 32 layers, rank 16"
    assert second.bound() == "decoder q, k, v, o, gate, up, down of 32 layers, rank 64"
    assert third.rank_of("decoder.down") == 16


def test_attention_alone_can_be_changed():
    [only] = adapters(number=1, targets="attention")
    assert only.bound() == "decoder q, k, v, o of 32 layers, rank 16"


def test_an_adapter_counts_as_large_as_a_real_one(three):
    assert three[1].size_bytes == pytest.approx(320e6, rel=0.01)


def test_adapters_and_layers_differ(three):
    first, second, third = (a.pairs["decoder.q"] for a in three)
    assert not np.array_equal(first[0].a_RK, third[0].a_RK)
    assert not np.array_equal(first[0].a_RK, first[1].a_RK)
    assert not np.array_equal(first[0].a_RK, first[0].b_RN)
    assert not np.array_equal(first[0].a_RK, second[0].a_RK[:16])


@pytest.mark.parametrize("site", ["decoder.q", "decoder.up", "decoder.down"])
def test_updates_are_a_tenth_of_what_they_change(three, site):
    pair = three[1].pairs[site][5]
    a_RK, b_RN = (array.astype(np.float32) for array in (pair.a_RK, pair.b_RN))
    update_KN = pair.scale * a_RK[:, :256].T @ b_RN[:, :256]
    assert update_KN.std() == pytest.approx(0.1 * pair.a_RK.shape[1] ** -0.5, rel=0.1)


def test_a_seed_gives_the_same_adapters():
    [one], [same], [other] = (adapters(number=1, seed=seed) for seed in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
