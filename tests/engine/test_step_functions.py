"""Functions of the engine that are compiled together."""

import numpy as np

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
