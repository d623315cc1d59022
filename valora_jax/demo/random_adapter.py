"""Writes a PEFT LoRA folder of random weights for a checkpoint.

For showing and timing what adapters do to a batch, where no trained ones are at hand.
"""

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from valora_jax.models import read_spec
from valora_jax.models.loading import read_config

# The update is a few per cent of a weight matrix: answers change, but stay sentences.
_B_SCALE = 0.2


def write_random_adapter(
    folder: Path, *, model: str | os.PathLike[str], rank: int, seed: int
) -> Path:
    """Makes an adapter on every linear of the decoder, and returns its folder.

    Args:
      folder: made if it is not there; equal arguments write equal bytes.
      model: the checkpoint folder that the adapter fits.
      rank: of every pair; alpha is the same number, so the scale is 1.
      seed: of the weights.

    Raises:
      CheckpointError: `model` is no checkpoint of a known family.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    modules = set()
    for module, (site, _) in read_spec(read_config(Path(model))).adapter_target.instances().items():
        if site.name.startswith("decoder."):
            modules.add(module)
            a_RK = rng.standard_normal((rank, site.in_width), np.float32) / site.in_width**0.5
            b_NR = rng.standard_normal((site.out_width, rank), np.float32) * _B_SCALE / rank**0.5
            tensors[f"base_model.model.{module}.lora_A.weight"] = a_RK.astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = b_NR.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"target_modules": sorted(modules), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder
