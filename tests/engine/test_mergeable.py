"""Traits: measured once, without waiting; weak adapters are refused once and said so."""

import dataclasses
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from tests.lora.test_merged_copy import pools
from valora_jax.engine.events import Events, MergeRefused
from valora_jax.engine.mergeable import Traits
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.strength import BaseEnergy

REF = AdapterRef(name="style", version=3)


@dataclasses.dataclass
class Placed:
    slot: int | None = 1

    def pages(self, ref):
        return {"decoder.q": 2, "decoder.o": 1}

    def slot_of(self, ref):
        return self.slot


def energies(*, weights: float = 1e9, error: float = 0.0) -> dict[str, list[BaseEnergy[float]]]:
    return {site: [BaseEnergy(weights, error)] * 2 for site in pools()}


def traits(
    adapters, *, error: float | None, weights: float = 1e9, events: Events | None = None
) -> Traits:
    base = None if error is None else energies(weights=weights, error=error)
    return Traits(adapters, pools=pools, base=base, events=events or Events())


def settled(of: Traits):
    """Asks until the device has answered."""
    found = of(REF)
    while of._pending:
        for energy in of._pending.get(REF, {}).values():
            energy.block_until_ready()
        found = of(REF)
    return found


def test_pages_are_a_mean_weighed_by_width():
    of = traits(Placed(), error=0.0)
    # Widths in and out: 64 + 64 of q, 64 + 128 of k, 64 + 64 of o.
    assert of(REF).pages == pytest.approx((2 * 128 + 128) / (128 + 192 + 128))


@pytest.mark.parametrize(("error", "mergeable"), [(0.0, True), (1.0, True), (1e6, False)])
def test_what_rounding_would_lose_decides(error, mergeable):
    of = traits(Placed(), error=error)
    assert not of(REF).mergeable  # it is being measured
    assert settled(of).mergeable == mergeable
    assert of.refused == (not mergeable)


def test_a_refusal_is_told_and_logged_once(caplog):
    events, heard = Events(), []
    events.listen(heard.append)
    of = traits(Placed(), error=1e6, events=events)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            settled(of)
    [record] = caplog.records
    assert "adapter 'style' version 3 is served unmerged" in record.getMessage()
    [event] = heard
    assert event.adapter == REF
    assert event.reason.startswith("rounding merged weights would lose")
    assert isinstance(event, MergeRefused)


class Energy:
    """What the device measures; its copy to the host comes before those of later steps if begun."""

    ready = begun = False

    def copy_to_host_async(self) -> None:
        self.begun = True

    def is_ready(self) -> bool:
        return self.ready

    def __array__(self, *_, **__):
        assert self.ready
        return np.ones(2, np.float32)


def test_the_copy_to_the_host_begins_with_the_measurement_and_nobody_waits(monkeypatch):
    energy = {site: Energy() for site in pools()}
    monkeypatch.setattr("valora_jax.engine.mergeable.update_energy", lambda *_: energy)
    of = traits(Placed(), error=0.0)
    assert not of(REF).mergeable
    assert all(x.begun for x in energy.values())
    assert not of(REF).mergeable
    for x in energy.values():
        x.ready = True
    assert of(REF).mergeable


def test_an_adapter_that_is_not_placed_is_measured_when_it_is():
    adapters = Placed(slot=None)
    of = traits(adapters, error=0.0)
    assert not settled(of).mergeable
    adapters.slot = 1
    assert settled(of).mergeable


def test_without_a_part_in_the_decoder_there_is_nothing_to_lose():
    of = traits(Placed(slot=2), error=1e6)
    assert settled(of).mergeable


def test_an_adapter_that_is_not_a_number_is_refused():
    broken = {
        site: dataclasses.replace(pool, a_RD=jnp.full_like(pool.a_RD, jnp.nan))
        for site, pool in pools().items()
    }
    of = Traits(Placed(), pools=lambda: broken, base=energies(), events=Events())
    assert not settled(of).mergeable
    assert of.refused == 1


def test_nothing_is_measured_where_nothing_is_merged():
    of = traits(Placed(), error=None)
    assert not of(REF).mergeable
    assert of._pending == {}
    assert of.refused == 0


def test_a_version_that_is_gone_is_forgotten():
    of = traits(Placed(), error=0.0)
    settled(of)
    of.forget(REF)
    assert of._known == {}


def test_an_update_that_overflows_is_refused():
    huge = {
        site: dataclasses.replace(pool, scale_LS=jnp.full_like(pool.scale_LS, 1e30))
        for site, pool in pools().items()
    }
    of = Traits(Placed(), pools=lambda: huge, base=energies(), events=Events())
    assert not settled(of).mergeable


def test_an_update_larger_than_the_weights_is_refused(caplog):
    of = traits(Placed(), error=0.0, weights=1.0)
    with caplog.at_level(logging.WARNING):
        assert not settled(of).mergeable
    [record] = caplog.records
    assert "times as large as the weights" in record.getMessage()
