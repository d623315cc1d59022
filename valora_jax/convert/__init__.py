"""Conversions between folders: Hugging Face, PEFT and Orbax; merging; what a folder holds."""

from valora_jax.convert.adapters import orbax_to_peft, peft_to_orbax
from valora_jax.convert.inspection import inspect_folder
from valora_jax.convert.merge import merge_adapter, read_combination
from valora_jax.convert.models import hf_to_orbax, orbax_to_hf

__all__ = [
    "hf_to_orbax",
    "inspect_folder",
    "merge_adapter",
    "orbax_to_hf",
    "orbax_to_peft",
    "peft_to_orbax",
    "read_combination",
]
