"""From a spec and loaded weights to a module, and back to the flat names of the weight map."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from valora_jax.models.loading import load_weights
from valora_jax.models.spec import Model, ModelSpec


def abstract_model(spec: ModelSpec, *, dtype: DTypeLike) -> Model:
    """The module with shapes in place of weights; costs nothing at any size."""
    return nnx.eval_shape(lambda: spec.build(dtype=dtype, rngs=nnx.Rngs(0)))


def random_model(spec: ModelSpec, *, dtype: DTypeLike, seed: int) -> Model:
    """The module with random weights, made on the device in one compiled call."""
    graphdef, _ = nnx.split(abstract_model(spec, dtype=dtype))
    make = jax.jit(lambda: nnx.state(spec.build(dtype=dtype, rngs=nnx.Rngs(seed)), nnx.Param))
    return nnx.merge(graphdef, make())


def parameter_paths(model: Model) -> dict[str, nnx.Variable]:
    """Dotted path, as in the weight map, of every parameter."""
    state = nnx.state(model, nnx.Param)
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def with_weights(spec: ModelSpec, weights: Mapping[str, jax.Array], *, dtype: DTypeLike) -> Model:
    """Puts weights by dotted path into a module."""
    graphdef, state = nnx.split(abstract_model(spec, dtype=dtype), nnx.Param)
    flat = [
        (path, leaf.replace(weights[".".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def load_model(folder: Path, spec: ModelSpec, *, dtype: DTypeLike, progress: bool) -> Model:
    """Streams a checkpoint folder into a module; raises what `load_weights` raises."""
    weights = load_weights(
        folder,
        spec.entries,
        canonical=spec.canonical_name,
        ignored=spec.ignored_names,
        dtype=jnp.dtype(dtype),
        progress=progress,
    )
    return with_weights(spec, weights, dtype=dtype)
