import math
from pathlib import Path

import pytest

from valora_jax.config import EngineConfig
from valora_jax.replay.settings import ENGINE, ReplaySettings

NAN = math.nan


def test_the_default_sweep_is_in_order():
    ReplaySettings(simulate=True).check()
    ReplaySettings(shapes="llava-1.5-13b", zipf=(1.0,), skews=()).check()


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({}, "give one of --model, --shapes and --simulate"),
        ({"simulate": True, "model": Path("x")}, "give one of --model, --shapes and --simulate"),
        ({"names": ("a",)}, "--names are of the traces in a file"),
        ({"trace": Path("x"), "rates": (1.0,)}, "have their own rates"),
        ({"trace": Path("x"), "loads": (1.0,)}, "have their own rates"),
        ({"policies": (), "bound": False}, "nothing to replay"),
        ({"skews": ()}, "no share of requests for adapters"),
        ({"skews": (1.5,)}, "--skews 1.5 is no share"),
        ({"skews": (NAN,)}, "--skews nan is no share"),
        ({"zipf": (-1.0,)}, "--zipf -1.0 must be 0 or more, and finite"),
        ({"zipf": (NAN,)}, "--zipf nan must be 0 or more"),
        ({"seed": -1}, "--seed -1 must be 0 or more, and finite"),
        ({"adapters": ()}, "--adapters needs at least one number"),
        ({"adapters": (4, 0)}, "--adapters 0 must be positive"),
        ({"ranks": (-8,)}, "--ranks -8 must be positive"),
        ({"rates": (0.0,)}, "--rates 0.0 must be positive"),
        ({"rates": (4.0, NAN)}, "--rates nan must be positive"),
        ({"loads": (NAN,)}, "--loads nan must be positive"),
        ({"seconds": 0.0}, "--seconds 0.0 must be positive"),
        ({"seconds": NAN}, "--seconds nan must be positive"),
        ({"seconds": math.inf}, "--seconds inf must be positive and finite"),
        ({"capacity": NAN}, "--capacity nan must be positive"),
        ({"cv": NAN}, "--cv nan must be positive"),
        ({"resident": 0}, "--resident 0 must be positive"),
        ({"resident": 8}, "--resident 8: adapter slots do not run out with --simulate"),
        ({"engine": EngineConfig(kv_pages=9)}, "--engine.kv-pages 9: key-value pages do not"),
    ],
)
def test_a_fault_is_named(flags, fault):
    with pytest.raises(ValueError, match=fault):
        ReplaySettings(**({"simulate": True} if flags else {}) | flags).check()


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)give one of.*--seconds -1 must be positive"):
        ReplaySettings(seconds=-1).check()


def test_a_replay_does_not_profit_from_the_one_before():
    assert not ENGINE.prefix_cache
