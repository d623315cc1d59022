"""Files of named tensors on disk, read lazily into numpy: safetensors and torch's own formats."""

from valora_jax.tensorfiles.checkpoint import (
    ADAPTER_FILES,
    MODEL_FILES,
    Checkpoint,
    open_checkpoint,
)
from valora_jax.tensorfiles.interface import TensorFile, TensorInfo
from valora_jax.tensorfiles.opening import open_tensors

__all__ = [
    "ADAPTER_FILES",
    "MODEL_FILES",
    "Checkpoint",
    "TensorFile",
    "TensorInfo",
    "open_checkpoint",
    "open_tensors",
]
