import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lora.test_merged_copy import LAYERS, SLOTS, pools, random, update
from valora_jax.lora.strength import base_energy, update_energy


@pytest.mark.parametrize("slot", range(SLOTS))
def test_energy_is_the_squared_norm_of_the_update(slot):
    got = update_energy(pools(), jnp.int32(slot))
    for site, pool in pools().items():
        want = [np.sum(update(pool, layer=i, slot=slot) ** 2) for i in range(LAYERS)]
        np.testing.assert_allclose(got[site], want, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounding_energy_is_what_rounding_a_sum_costs(dtype):
    """Small random updates of random weights are rounded by that much."""
    base_DE = random(1, 128, 96, dtype=dtype)
    exact_DE = np.array(base_DE, np.float64)
    exact_DE += 1e-2 * exact_DE.std() * np.random.default_rng(0).standard_normal(exact_DE.shape)
    rounded_DE = np.array(jnp.asarray(exact_DE.astype(np.float32)).astype(dtype), np.float64)
    if dtype == jnp.float32:
        rounded_DE = exact_DE.astype(np.float32).astype(np.float64)
    error_DE = (rounded_DE - exact_DE) ** 2
    got = base_energy(base_DE, columns=(0, 32))
    weights_DE = np.array(base_DE, np.float64) ** 2
    want = [(x[:, :32].sum(), x[:, 32:].sum()) for x in (weights_DE, error_DE)]
    np.testing.assert_allclose(np.transpose(jax.device_get(got)), want, rtol=0.1)


def test_zeros_cost_nothing_to_round():
    [got] = base_energy(jnp.zeros((16, 16), jnp.bfloat16), columns=(0,))
    assert got == (0, 0)
