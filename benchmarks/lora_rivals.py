"""The other ways to multiply many adapters, in plain XLA, each with its weights as it likes them.

    scale of the row's adapter * (x_TD @ A^T) @ B

P adapters of the batch, R the largest of their ranks; the other letters are those of `lora_cases`.
Rows are sorted by adapter, an equal number each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Adapters(NamedTuple):
    """The adapters of one call, short ranks filled up with zeros."""

    a_PRD: jax.Array
    b_PRE: jax.Array
    scale_P: jax.Array


@jax.jit
def masked_dense(x_TD, adapters: Adapters, nth_T) -> jax.Array:
    """Multiplies every row by every adapter and keeps its own: what serves without a kernel."""
    a_PRD, b_PRE, scale_P = adapters
    h_TPR = jnp.einsum("TD,PRD->TPR", x_TD, a_PRD, preferred_element_type=jnp.float32)
    mine_TP = jnp.arange(a_PRD.shape[0]) == nth_T[:, None]
    h_TPR = (h_TPR * jnp.where(mine_TP, scale_P, 0)[..., None]).astype(x_TD.dtype)
    return jnp.einsum("TPR,PRE->TE", h_TPR, b_PRE)


@jax.jit
def adapter_loop(x_TD, adapters: Adapters, nth_T) -> jax.Array:
    """Two products an adapter, on its rows alone; sizes of the runs are known in advance here."""
    del nth_T
    rows = x_TD.shape[0] // len(adapters.scale_P)
    pieces = []
    for p, scale in enumerate(adapters.scale_P):
        own = slice(p * rows, (p + 1) * rows)
        h_TR = jnp.dot(x_TD[own], adapters.a_PRD[p].T, preferred_element_type=jnp.float32)
        h_TR = (h_TR * scale).astype(x_TD.dtype)
        pieces.append(jnp.dot(h_TR, adapters.b_PRE[p]))
    return jnp.concatenate(pieces)


@jax.jit
def gather_bmm(x_TD, adapters: Adapters, nth_T) -> jax.Array:
    """Gathers each row's own copy of its adapter, then multiplies a batch of vectors."""
    a_TRD, b_TRE = adapters.a_PRD[nth_T], adapters.b_PRE[nth_T]
    h_TR = jnp.einsum("TD,TRD->TR", x_TD, a_TRD, preferred_element_type=jnp.float32)
    h_TR = (h_TR * adapters.scale_P[nth_T][:, None]).astype(x_TD.dtype)
    return jnp.einsum("TR,TRE->TE", h_TR, b_TRE)


RIVALS = {"masked-dense": masked_dense, "loop": adapter_loop, "gather-bmm": gather_bmm}
# Above these XLA takes too long to find the best form; both were slow where they were measured.
GATHER_TOKENS, LOOP_ADAPTERS = 128, 8


def suits(rival: str, *, tokens: int, adapters: int) -> bool:
    """Whether a rival is worth the time that XLA takes to compile it."""
    if rival == "gather-bmm":
        return tokens <= GATHER_TOKENS
    return rival != "loop" or adapters <= LOOP_ADAPTERS
