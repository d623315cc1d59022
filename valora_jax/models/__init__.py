"""Model families: one folder each, found by the `model_type` of a checkpoint's `config.json`."""

from collections.abc import Mapping
from typing import Any

from valora_jax.errors import CheckpointError
from valora_jax.models.llava15.spec import read_spec as read_llava15_spec
from valora_jax.models.spec import ModelSpec, SpecReader

FAMILIES: Mapping[str, SpecReader] = {"llava": read_llava15_spec}


def read_spec(hf: Mapping[str, Any]) -> ModelSpec:
    """Finds the family of a parsed `config.json` and reads its sizes.

    Raises:
      CheckpointError: the model type is not known, or values are malformed.
      NotImplementedError: values are legal, but not ported.
    """
    if (reader := FAMILIES.get(hf.get("model_type", ""))) is None:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError([f"config.json: model_type={hf.get('model_type')!r}; known: {known}"])
    return reader(hf)
