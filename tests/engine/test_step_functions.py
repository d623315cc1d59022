"""Functions of the engine that are compiled together."""

import gc

import numpy as np
import pytest

from valora_jax.engine.step_functions import Call, StepFunctions


def scaled(factor, x):
    return factor * x


def test_what_was_compiled_together_is_not_traced_again():
    functions, reports = StepFunctions(), []
    calls = [Call(scaled, factor, dict(x=np.float32(1))) for factor in (2, 3)]
    functions.compile_together(calls, lambda done, total: reports.append((done, total)))
    assert functions.traces == 2
    assert [functions.of(scaled, factor)(x=np.float32(5)) for factor in (2, 3)] == [10, 15]
    functions.of(scaled, 4)(x=np.float32(5))
    assert functions.traces == 3
    assert reports == [(0, 4), (1, 4), (3, 4), (4, 4)]


def test_a_fault_leaves_garbage_to_be_collected():
    def refuse(shape, x):
        raise ValueError(f"not for {shape}")

    with pytest.raises(ValueError, match="not for 1"):
        StepFunctions().compile_together([Call(refuse, 1, dict(x=np.float32(1)))], lambda *_: None)
    assert gc.isenabled()
