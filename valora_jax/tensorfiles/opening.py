"""Opens a file of tensors by its suffix."""

import os
from pathlib import Path

from valora_jax.errors import TensorFileError
from valora_jax.tensorfiles.interface import TensorFile
from valora_jax.tensorfiles.safetensors_file import SafetensorsFile
from valora_jax.tensorfiles.torch_file import TorchFile

READERS = {
    ".safetensors": SafetensorsFile,
    ".bin": TorchFile,
    ".pt": TorchFile,
    ".pth": TorchFile,
}


def open_tensors(path: str | os.PathLike[str]) -> TensorFile:
    """Opens a `.safetensors` file, or a torch `.bin`, `.pt` or `.pth` without running its pickle.

    Raises:
      TensorFileError: there is no such file, it is damaged, or it is of a kind not read here.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise TensorFileError(path, f"want a file ending in {', '.join(READERS)}")
    if not path.is_file():
        raise TensorFileError(path, "no such file")
    if path.stat().st_size == 0:
        raise TensorFileError(path, "the file is empty")
    return READERS[path.suffix](path)
