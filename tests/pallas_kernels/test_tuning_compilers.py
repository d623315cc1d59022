"""Functions that other processes compile."""

import functools
import multiprocessing
import os
import signal
from multiprocessing.connection import Client, Listener

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tuning import compilers
from pallas_kernels.tuning.compilers import CompileError, Compilers, load

TWO, THREE = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (2, 3))
HALVE = functools.partial(jnp.split, indices_or_sections=2)


def test_what_another_process_compiles_runs_here_and_what_does_not_compile_is_told():
    with Compilers() as pool:
        halved, refused = (pool.submit(HALVE, [of]) for of in (TWO, THREE))
        first, second = load(halved(), [TWO], result=[0, 0])(jnp.arange(2.0))
        assert (first.tolist(), second.tolist()) == ([0], [1])
        with pytest.raises(CompileError, match="does not result in an equal division"):
            load(refused(), [THREE], result=[0, 0])


def test_a_function_that_ends_its_compiler_takes_no_other_with_it():
    with Compilers() as pool:
        lost, halved = (pool.submit(fn, [TWO]) for fn in (_end_process, HALVE))
        with pytest.raises(CompileError, match="its compiler crashes"):
            load(lost(), [TWO], result=[])
        load(halved(), [TWO], result=[0, 0])
        load(pool.submit(HALVE, [TWO])(), [TWO], result=[0, 0])


def _end_process(_):
    os._exit(1)


def test_compilers_end_with_a_parent_that_is_killed():
    with Listener(family="AF_UNIX") as listener:
        how = dict(target=_leave_a_compiler, args=(listener.address,))
        parent = multiprocessing.get_context("spawn").Process(**how)
        parent.start()
        parent.join(60)
        assert parent.exitcode == -signal.SIGKILL
        with listener.accept() as compiler:
            assert compiler.poll(10), "it waits for work for ever"
            with pytest.raises(EOFError):
                compiler.recv()


def _leave_a_compiler(address):
    Compilers().submit(functools.partial(_connect, address=address), [TWO])()
    os.kill(os.getpid(), signal.SIGKILL)


def _connect(_, *, address):
    _connections.append(Client(address))
    raise ValueError("no function")


_connections = []  # that end with the process


def test_a_host_of_many_cores_does_not_fill_the_device_with_compilers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(256))
    with Compilers() as many:
        assert many.processes == compilers.MOST_PROCESSES
