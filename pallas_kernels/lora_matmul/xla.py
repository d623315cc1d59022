"""The LoRA operator in plain XLA: a loop over the active pages, each masked to its own rows.

The trip count is run-time data, so one executable serves any number of adapters of any ranks and
time follows the sum of the ranks in use. Gathering all active pages first and multiplying once
was 3.5 times slower on a CPU (docs/decisions.md).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.lora_matmul.layout import PAGE_RANKS


# Under a jit of its own, with the layer as an operand, a step of many layers traces and lowers this
# once a shape; XLA inlines it again.
@jax.jit
def lora_matmul(y_TE, x_TD, pool, active, adapter_T, layer):
    """See `api.lora_matmul`, which has checked the shapes."""
    layers = pool.scale_LS.shape[0]
    layer_row = layer * (pool.a_RD.shape[0] // layers)

    def add_page(i, y_TE):
        row = layer_row + active.page_P[i] * PAGE_RANKS
        a_rD = jax.lax.dynamic_slice_in_dim(pool.a_RD, row, PAGE_RANKS).astype(x_TD.dtype)
        b_rE = jax.lax.dynamic_slice_in_dim(pool.b_RE, row, PAGE_RANKS).astype(x_TD.dtype)
        owner = active.owner_P[i]
        scale_T = jnp.where(adapter_T == owner, pool.scale_LS[layer, owner], 0.0)
        h_Tr = jnp.einsum("TD,rD->Tr", x_TD, a_rD, preferred_element_type=jnp.float32)
        h_Tr = (h_Tr * scale_T[:, None]).astype(x_TD.dtype)
        return y_TE + jnp.dot(h_Tr, b_rE, preferred_element_type=jnp.float32).astype(y_TE.dtype)

    return jax.lax.fori_loop(0, active.count, add_page, y_TE)
