"""Orbax folders: those of Hugging Face with an Orbax checkpoint in place of the tensor files.

    config.json, tokenizer.json, …   side files, byte for byte
    valora_orbax.json                what the folder holds, and the tensors' names in the source
    orbax_weights/                   Orbax: flat dict of name -> array

A model's arrays are in our layout under our paths, so loading lays nothing out again; an adapter's
are as PEFT has them.
"""

from valora_jax.checkpoint.folder import Manifest, is_orbax, read_manifest, write_orbax
from valora_jax.checkpoint.loading import load_model, load_weights

__all__ = [
    "Manifest",
    "is_orbax",
    "load_model",
    "load_weights",
    "read_manifest",
    "write_orbax",
]
