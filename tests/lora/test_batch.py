import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.lora_matmul import LoraPool, Part, reference
from valora_jax.layers.linear import Linear
from valora_jax.lora.batch import LoraBatch

LAYERS, PAGES, SLOTS, D, E = 2, 4, 3, 24, 20
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


def make_batch(adapter_T, *, biased: bool) -> LoraBatch:
    keys = jax.random.split(jax.random.key(0), 4)
    rows = LAYERS * PAGES * 16
    pool = LoraPool(
        a_RD=jax.random.normal(keys[0], (rows, D)),
        b_RE=jax.random.normal(keys[1], (rows, E)),
        scale_LS=jax.random.uniform(keys[2], (LAYERS, SLOTS)),
        page_SW=jnp.array([[2], [0], [3]], jnp.int32),
        pages_S=jnp.array([1, 0, 1], jnp.int32),
    )
    bias_LSE = jax.random.normal(keys[3], (LAYERS, SLOTS, E))
    return LoraBatch.of(
        jnp.array(adapter_T, jnp.int32),
        pools={"up": pool},
        biases_LSE={"up": bias_LSE} if biased else {},
        implementation="xla",
    )


def add(batch: LoraBatch, y_TE, x_TD, *, layer: int) -> jax.Array:
    return batch.add(y_TE, x_TD, sites=("up",), columns=(0,), layer=layer)


def expected(batch: LoraBatch, y_TE, x_TD, *, layer: int) -> np.ndarray:
    parts = [Part(pool=batch.pools["up"], column=0)]
    out_TE = reference.lora_matmul(y_TE, x_TD, parts, adapter_T=batch.adapter_T, layer=layer)
    if "up" in batch.biases_LSE:
        for t, slot in enumerate(np.asarray(batch.adapter_T)):
            out_TE[t] += np.asarray(batch.biases_LSE["up"])[layer, slot] if slot >= 0 else 0
    return out_TE


def rows(count: int) -> tuple[jax.Array, jax.Array]:
    kx, ky = jax.random.split(jax.random.key(1))
    return jax.random.normal(kx, (count, D)), jax.random.normal(ky, (count, E))


def test_rows_get_product_and_bias_of_their_slot():
    for biased in (False, True):
        batch, (x_TD, y_TE) = make_batch([2, -1, 0, 2], biased=biased), rows(4)
        for layer in range(LAYERS):
            got_TE = add(batch, y_TE, x_TD, layer=layer)
            np.testing.assert_allclose(got_TE, expected(batch, y_TE, x_TD, layer=layer), **FLOAT32)


def test_rows_without_an_adapter_stay_as_they_are():
    batch, (x_TD, y_TE) = make_batch([-1, -1], biased=True), rows(2)
    np.testing.assert_array_equal(add(batch, y_TE, x_TD, layer=1), y_TE)


def test_the_result_has_the_type_of_the_base_product():
    batch, (x_TD, y_TE) = make_batch([2, -1], biased=True), rows(2)
    x_TD, y_TE = x_TD.astype(jnp.bfloat16), y_TE.astype(jnp.bfloat16)
    assert add(batch, y_TE, x_TD, layer=0).dtype == jnp.bfloat16


def test_other_rows_take_the_same_adapters():
    batch, (x_SD, y_SE) = make_batch([2, -1, 0, 2], biased=True), rows(2)
    sampled = batch.at_rows(batch.adapter_T[jnp.array([3, 1])])
    assert sampled.pools is batch.pools
    got_SE = add(sampled, y_SE, x_SD, layer=0)
    np.testing.assert_allclose(got_SE, expected(sampled, y_SE, x_SD, layer=0), **FLOAT32)


def test_a_linear_skips_the_sites_that_serve_no_adapters():
    linear = Linear(D, (E, E), sites=("gate", "up"), layer=1, dtype=jnp.float32, rngs=nnx.Rngs(0))
    batch, (x_TD, _) = make_batch([2, 0], biased=True), rows(2)
    base_gate_TE, base_up_TE = linear(x_TD, None)
    gate_TE, up_TE = linear(x_TD, batch)
    np.testing.assert_array_equal(gate_TE, base_gate_TE)
    np.testing.assert_allclose(up_TE, expected(batch, base_up_TE, x_TD, layer=1), **FLOAT32)


def test_a_batch_is_a_pytree_whose_implementation_is_static():
    batch = make_batch([2, -1], biased=True)
    leaves, tree = jax.tree.flatten(batch)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.unflatten(tree, leaves).implementation == "xla"
