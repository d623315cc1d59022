"""Functions that other processes compile."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tuning.compilers import CompileError, Compilers, load

TWO, THREE = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2, 3))
HALVE = functools.partial(jnp.split, indices_or_sections=2)


def test_what_another_process_compiles_runs_here_and_what_does_not_compile_is_told():
    with Compilers() as compilers:
        halved, refused = (compilers.submit(HALVE, [of]) for of in (TWO, THREE))
        first, second = load(halved(), [TWO], result=[0, 0])(jnp.arange(2.0))
        assert (first.tolist(), second.tolist()) == ([0], [1])
        with pytest.raises(CompileError, match="does not result in an equal division"):
            load(refused(), [THREE], result=[0, 0])


def test_a_function_that_ends_its_compiler_takes_no_other_with_it():
    with Compilers() as compilers:
        lost, halved = (compilers.submit(fn, [TWO]) for fn in (_end_process, HALVE))
        with pytest.raises(CompileError, match="its compiler crashes"):
            load(lost(), [TWO], result=[])
        load(halved(), [TWO], result=[0, 0])
        load(compilers.submit(HALVE, [TWO])(), [TWO], result=[0, 0])


def _end_process(_):
    os._exit(1)
