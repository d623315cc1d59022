"""PEFT LoRA folders: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`."""

import os
from pathlib import Path

from valora_jax.lora.adapter import Adapter, AdapterTarget
from valora_jax.lora.binding import bind
from valora_jax.lora.peft_config import read_config
from valora_jax.tensorfiles import ADAPTER_FILES, open_checkpoint


def read_peft(folder: str | os.PathLike[str], *, name: str, target: AdapterTarget) -> Adapter:
    """Reads any LoRA that PEFT saves for the linears of a model, and the heads saved with it.

    Ranks are read off the tensors and must agree with r and rank_pattern; a `lm_head` or another
    linear in modules_to_save replaces the base's, and a module that the model does not have is a
    task head. A `.bin` file is read without running its pickle.

    Raises:
      AdapterError: config or tensors do not make sense for this model; every fault is listed.
      TensorFileError: the file of tensors is missing or damaged.
      NotImplementedError: it is legal PEFT, but not plain LoRA on linears (DoRA, IA3, trained
        biases, embeddings, …).
    """
    folder = Path(folder)
    config = read_config(folder, name=name)
    files = open_checkpoint(folder, files=ADAPTER_FILES)
    tensors = {key: file.read(key) for file in files.stream() for key in file.names}
    source = f"PEFT folder {folder}, trained on {config.base_model}"
    return bind(tensors, config=config, target=target, name=name, source=source)
