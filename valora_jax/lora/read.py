"""The one door to adapter folders: picks the reader by what lies in the folder."""

import os
from pathlib import Path

from valora_jax.errors import AdapterError
from valora_jax.lora.adapter import Adapter, AdapterTarget
from valora_jax.lora.llava_original import is_llava_original, read_llava_original
from valora_jax.lora.peft import read_peft


def read_adapter(folder: str | os.PathLike[str], *, name: str, target: AdapterTarget) -> Adapter:
    """Reads an adapter folder of PEFT or of the original LLaVA code onto the host.

    The values are checked to be finite and to fit the model; nothing in the folder is executed.
    If the result `needs_base`, pass it through `combine.with_base` before it is served.

    Raises:
      AdapterError: the folder does not exist, or its content does not fit; lists every fault.
      TensorFileError: a file of tensors is missing or damaged.
      NotImplementedError: the adapter is legal, but not of a kind that is served.
    """
    if not Path(folder).is_dir():
        raise AdapterError(name, [f"{os.fspath(folder)}: no such folder"])
    read = read_llava_original if is_llava_original(folder) else read_peft
    return read(folder, name=name, target=target)
