"""An engine around random weights of a published size: no file is read."""

import functools
import math

import jax
import jax.numpy as jnp
import tokenizers
from jax.typing import DTypeLike
from rich.console import Console
from tokenizers import decoders, models

from valora_jax.config import EngineConfig
from valora_jax.engine.precision import Precision
from valora_jax.engine.shapes import kernel_of
from valora_jax.engine.start import Parts, assemble
from valora_jax.media.clip_pixels import ClipPixels
from valora_jax.media.tokenizer import Tokenizer
from valora_jax.models.build import abstract_model, parameter_paths, with_weights
from valora_jax.models.llava15.config import LLAVA_1_5_7B, LLAVA_1_5_13B
from valora_jax.models.llava15.spec import spec_of
from valora_jax.models.spec import Model, ModelSpec
from valora_jax.replay.settings import Shapes

_CONFIGS = {"llava-1.5-7b": LLAVA_1_5_7B, "llava-1.5-13b": LLAVA_1_5_13B}


def random_parts(shapes: Shapes, config: EngineConfig, *, show_progress: bool) -> Parts:
    """Makes the weights on the device, takes the memory and compiles every step.

    Raises:
      ValueError: the configured sizes do not fit the device.
      NotImplementedError: the kernels do not run on it.
    """
    kernel_of(config.kernels)  # before weights are made
    spec = spec_of(_CONFIGS[shapes])
    precision = Precision.choose(config.dtype, stored="bfloat16")
    _, height, width = spec.pixel_shape
    return assemble(
        random_model(spec, dtype=precision.weights),
        spec,
        config,
        precision,
        random_tokenizer(spec.vocab_rows),
        ClipPixels(resize=None, crop_HW=(height, width), rescale=None, mean=None, std=None),
        Console(stderr=True, quiet=not show_progress),
    )


def random_model(spec: ModelSpec, *, dtype: DTypeLike) -> Model:
    """A model whose layers keep the size of what they are given."""
    paths = parameter_paths(abstract_model(spec, dtype=dtype))
    keys = jax.random.split(jax.random.key(0), len(paths))
    weights = {
        path: _weights(key, tuple(leaf.get_value().shape), jnp.dtype(dtype), path.endswith("bias"))
        for key, (path, leaf) in zip(keys, paths.items(), strict=True)
    }
    return with_weights(spec, weights, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _weights(key, shape: tuple[int, ...], dtype: jnp.dtype, is_bias: bool) -> jax.Array:
    if is_bias:
        return jnp.zeros(shape, dtype)
    if len(shape) < 2:
        return jnp.ones(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(math.prod(shape[:-1]) ** -0.5, dtype)


def random_tokenizer(vocabulary: int) -> Tokenizer:
    """One word a token, put together as Llama's: a server's work of making text stays."""
    backend = tokenizers.Tokenizer(
        models.WordLevel({f"\u2581w{i}": i for i in range(vocabulary)}, unk_token="\u2581w0")
    )
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, special_tokens={})
