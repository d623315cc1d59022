"""The LoRA operator against a NumPy reference: mixed ranks, base rows, layers, bad shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lora_matmul as op
from pallas_kernels.lora_matmul import reference

LAYERS, PAGES, SLOTS, D, E = 2, 6, 4, 40, 24
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
# y is rounded to bf16 after each page, and h once: a few units of 8 significant bits.
BFLOAT16 = {"rtol": 2**-5, "atol": 2**-5}

CASES = {
    "nobody_has_an_adapter": ([-1, -1, -1], {}),
    "one_adapter": ([1, 1, 1, 1], {1: [3]}),
    "base_rows_between": ([1, -1, 1, -1], {1: [3]}),
    "mixed_ranks_unsorted": ([2, 1, 0, -1, 2, 1], {0: [5], 1: [1], 2: [2, 4]}),
    "active_but_absent": ([1, 1], {1: [3], 2: [2, 4]}),
    "one_row": ([3], {3: [1, 2, 3]}),
}


def make_pool(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    rows = LAYERS * PAGES * op.PAGE_RANKS
    return op.LoraPool(
        a_RD=jax.random.normal(keys[0], (rows, D), dtype) / D**0.5,
        b_RE=jax.random.normal(keys[1], (rows, E), dtype) / 4,
        scale_LS=jax.random.uniform(keys[2], (LAYERS, SLOTS)),
    )


def make_active(pages_of):
    pairs = [(page, owner) for owner, pages in pages_of.items() for page in pages]
    padded = np.full((PAGES, 2), 999)  # beyond count, nothing is read
    padded[: len(pairs)] = np.reshape(pairs, (-1, 2))
    return op.ActivePages(
        page_P=jnp.asarray(padded[:, 0], jnp.int32),
        owner_P=jnp.asarray(padded[:, 1], jnp.int32),
        count=jnp.int32(len(pairs)),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, FLOAT32), (jnp.bfloat16, BFLOAT16)])
@pytest.mark.parametrize(("adapters", "pages_of"), CASES.values(), ids=CASES.keys())
def test_every_row_gets_its_own_adapter(adapters, pages_of, dtype, tolerance):
    kx, ky = jax.random.split(jax.random.key(1))
    x_TD = jax.random.normal(kx, (len(adapters), D), dtype)
    y_TE = jax.random.normal(ky, (len(adapters), E), dtype)
    pool, active = make_pool(dtype), make_active(pages_of)
    adapter_T = jnp.asarray(adapters, jnp.int32)
    for layer in range(LAYERS):
        args = dict(active=active, adapter_T=adapter_T, layer=layer)
        got_TE = op.lora_matmul(y_TE, x_TD, pool, implementation="xla", **args)
        want_TE = reference.lora_matmul(y_TE, x_TD, pool, **args)
        np.testing.assert_allclose(np.float32(got_TE), want_TE, **tolerance)


def test_one_executable_serves_any_number_of_pages():
    traces = 0

    @jax.jit
    def run(x_TD, pool, active, adapter_T):
        nonlocal traces
        traces += 1
        y_TE = jnp.zeros((x_TD.shape[0], E))
        return op.lora_matmul(
            y_TE, x_TD, pool, active=active, adapter_T=adapter_T, layer=0, implementation="xla"
        )

    x_TD, pool = jnp.ones((3, D)), make_pool(jnp.float32)
    for pages_of in ({}, {1: [1]}, {1: [1, 2], 2: [3, 4, 5]}):
        run(x_TD, pool, make_active(pages_of), jnp.asarray([1, 2, -1], jnp.int32))
    assert traces == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_TD=jnp.ones((3, D + 1))), f"linear {D} -> {E}, x_TD and y_TE are {D + 1} -> {E}"),
        (dict(adapter_T=jnp.zeros(2, jnp.int32)), "row counts differ"),
        (dict(layer=LAYERS), r"layer=2 is not in \[0, 2\)"),
        (dict(implementation="cuda"), "unknown implementation 'cuda'"),
    ],
)
def test_contradicting_arguments_are_refused(change, message):
    args = dict(
        y_TE=jnp.zeros((3, E)),
        x_TD=jnp.ones((3, D)),
        pool=make_pool(jnp.float32),
        active=make_active({}),
        adapter_T=jnp.zeros(3, jnp.int32),
        layer=0,
        implementation="xla",
    )
    with pytest.raises(ValueError, match=message):
        op.lora_matmul(**(args | change))


def test_the_pool_is_a_pytree():
    pool = make_pool(jnp.float32)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, pool)
    assert [f.name for f in dataclasses.fields(doubled)] == ["a_RD", "b_RE", "scale_LS"]
