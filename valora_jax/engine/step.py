"""The compiled functions of the engine: a decoder step, sampling, scores, image features.

Pure: weights, adapters, cache and batch come as arguments and go back as results. `StepShape` is
what is fixed when a function is traced. T tokens, D model width, S sampled rows, V vocabulary rows,
F feature rows, I images.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import lora_matmul
from pallas_kernels.lora_matmul import Implementation as Kernel
from pallas_kernels.lora_matmul import LoraPool, Segments
from pallas_kernels.paged_attention import Chunks, Decodes, KVPages
from valora_jax.engine.batch import SCORE_ROWS, BatchLayout
from valora_jax.engine.sampler import (
    Sampled,
    SamplerState,
    sample,
    sample_likeliest,
    token_logprobs,
)
from valora_jax.layers.attention import AttentionBatch, KVCursor
from valora_jax.lora.batch import LoraBatch
from valora_jax.lora.heads import ReplacedHeads, replaced_logits
from valora_jax.models.spec import HEAD_SITE, Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdapterArrays:
    """What the device holds of adapters.

    Attributes:
      pools: LoRA site -> rank pages.
      biases_LSE: site -> biases of its slots.
      heads: replaced heads; may be none.
    """

    pools: Mapping[str, LoraPool]
    biases_LSE: Mapping[str, jax.Array]
    heads: ReplacedHeads


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ModelShape:
    """A module without its weights, which come as a flat list: `nnx.jit` takes 11 ms a call."""

    graphdef: nnx.GraphDef
    treedef: Any  # jax.tree_util.PyTreeDef, which type checkers take for a variable
    layers: int

    def __repr__(self) -> str:
        """Says the same of what is equal, and nothing else."""
        return f"ModelShape({self._digest})"

    @functools.cached_property
    def _digest(self) -> str:
        # 0.4 MB of text, which would be made for each function of a start.
        text = repr((self.graphdef, self.treedef, self.layers))
        return hashlib.sha256(text.encode()).hexdigest()

    def merge(self, leaves: Sequence[jax.Array]) -> Model:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepShape:
    """What one compilation of a step is for; equal to itself only.

    Attributes:
      model: the module.
      layout: fields of the batch.
      with_lora: whether rows may bring adapters.
      dtype: of the arithmetic; the cache and the weights have their own.
      kernel: which implementation of LoRA and attention runs.
    """

    model: ModelShape
    layout: BatchLayout
    with_lora: bool
    dtype: np.dtype
    kernel: Kernel


def compiler_options(shape: Hashable) -> dict[str, str | bool]:
    """Returns XLA's options for a function that is compiled for a shape."""
    # The engine takes most of the memory before it compiles, so XLA takes it for short and makes
    # small tables anew in every layer: 120 launches of a 7B step of 32 rows.
    options: dict[str, str | bool] = {"xla_disable_hlo_passes": "rematerialization"}
    if isinstance(shape, StepShape) and shape.kernel == "triton":
        options |= lora_matmul.compiler_options(shape.layout.rows)
    return options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepOutputs:
    """Attributes:
    hidden_TD: after the final norm.
    logits_SV: float32, of the rows that end a request's known tokens.
    sampled: their likeliest tokens, without log-probabilities.
    """

    hidden_TD: jax.Array
    logits_SV: jax.Array
    sampled: Sampled


def decoder_step(
    shape: StepShape,
    leaves: Sequence[jax.Array],
    kv: KVPages,
    state: SamplerState,
    features_FD: jax.Array,
    adapters: AdapterArrays | None,
    packed: jax.Array,
) -> tuple[KVPages, SamplerState, StepOutputs]:
    """Computes a step's tokens, and takes the likeliest next token of those rows that end one.

    `leaves` may have an adapter in the decoder's linears, the batch says which. Donate `kv` and
    `state`, which come back.
    """
    fields = shape.layout.unpack(packed)
    model = shape.model.merge(leaves)
    lora = _lora(shape, adapters, fields["adapter"], merged=fields["merged"])
    token_T = jnp.where(
        fields["token"] >= 0, fields["token"], state.last_token_R[fields["token_row"]]
    )
    x_TD = model.embed(token_T, features_FD=features_FD, feature_row_T=fields["feature_row"])
    cursor = KVCursor(kv, layers=shape.model.layers, batch=_attention(fields), kernel=shape.kernel)
    hidden_TD = model.decode(x_TD.astype(shape.dtype), fields["position"], cursor=cursor, lora=lora)
    index_S = fields["sample_index"]
    hidden_SD, adapter_S = hidden_TD[index_S], fields["adapter"][index_S]
    logits_SV = _logits(shape, model, adapters, hidden_SD, adapter_S)
    sampled, state = sample_likeliest(logits_SV, state, fields["state_row"])
    outputs = StepOutputs(hidden_TD=hidden_TD, logits_SV=logits_SV, sampled=sampled)
    return cursor.kv, state, outputs


def resample(
    layout: BatchLayout, state: SamplerState, logits_SV: jax.Array, packed: jax.Array
) -> tuple[SamplerState, Sampled]:
    """Samples a step's rows as their requests want it; donate `state`, which comes back."""
    sampled, state = sample(logits_SV, state, layout.unpack(packed))
    return state, sampled


def score(
    shape: StepShape,
    leaves: Sequence[jax.Array],
    adapters: AdapterArrays | None,
    hidden_TD: jax.Array,
    packed: jax.Array,
) -> tuple[jax.Array, Sampled]:
    """Logits `[T, V]` of a block of hidden states, and their targets as if they were sampled."""
    fields = shape.layout.unpack(packed)
    model = shape.model.merge(leaves)
    logits_TV = _logits(shape, model, adapters, hidden_TD, fields["adapter"])
    return logits_TV, token_logprobs(logits_TV, fields["target"])


def score_block(_: Hashable, hidden_TD: jax.Array, start: jax.Array) -> jax.Array:
    """The hidden states of a block of a step's tokens, `[SCORE_ROWS, D]`; zeros past their end."""
    padded_TD = jnp.pad(hidden_TD, ((0, SCORE_ROWS), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(padded_TD, start, SCORE_ROWS)


def encode_images(
    shape: StepShape,
    leaves: Sequence[jax.Array],
    features_FD: jax.Array,
    adapters: AdapterArrays | None,
    pixels_I3hw: jax.Array,
    packed: jax.Array,
) -> jax.Array:
    """Writes the features of images to their slots; donate `features_FD`, which comes back."""
    fields = shape.layout.unpack(packed)
    lora = _lora(shape, adapters, fields["adapter"], segments="few")  # one an image at most
    pixels_I3hw = pixels_I3hw.astype(shape.dtype)
    features_IXD = shape.model.merge(leaves).encode_images(pixels_I3hw, lora=lora)
    for i in range(pixels_I3hw.shape[0]):
        features_FD = jax.lax.dynamic_update_slice_in_dim(
            features_FD, features_IXD[i].astype(features_FD.dtype), fields["first_row"][i], 0
        )
    return features_FD


def _logits(
    shape: StepShape,
    model: Model,
    adapters: AdapterArrays | None,
    hidden_SD: jax.Array,
    adapter_S: jax.Array,
) -> jax.Array:
    """Logits `[S, V]`, each row through its adapter's head."""
    logits_SV = model.logits(hidden_SD)
    lora = _lora(shape, adapters, adapter_S)
    if adapters is None or lora is None:
        return logits_SV
    logits_SV = replaced_logits(logits_SV, hidden_SD, adapters.heads, adapter_S=adapter_S)
    return lora.add(logits_SV, hidden_SD, sites=(HEAD_SITE,), columns=(0,), layer=0)


def _lora(
    shape: StepShape,
    adapters: AdapterArrays | None,
    adapter_T: jax.Array,
    *,
    merged: jax.Array | int = -1,
    segments: Segments = "any",
) -> LoraBatch | None:
    if adapters is None or not shape.with_lora:
        return None
    return LoraBatch.of(
        adapter_T,
        pools=adapters.pools,
        biases_LSE=adapters.biases_LSE,
        merged=merged,
        implementation=shape.kernel,
        segments=segments,
    )


def _attention(fields: Mapping[str, jax.Array]) -> AttentionBatch:
    chunks = None
    if "chunk_start" in fields:
        chunks = Chunks(
            start_C=fields["chunk_start"],
            len_C=fields["chunk_len"],
            kv_len_C=fields["chunk_kv_len"],
            page_CW=fields["chunk_page"],
            count=fields["chunk_count"],
        )
    return AttentionBatch(
        page_T=fields["page"],
        offset_T=fields["offset"],
        decodes=Decodes(
            kv_len_D=fields["decode_kv_len"],
            page_DW=fields["decode_page"],
            count=fields["decode_count"],
        ),
        chunks=chunks,
    )
