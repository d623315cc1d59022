"""`.safetensors` files, through the safetensors library, which checks the header."""

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from valora_jax.errors import TensorFileError
from valora_jax.tensorfiles.interface import TensorFile, TensorInfo

# The library asks numpy for the dtype by name: it knows bfloat16 once ml_dtypes is imported, and
# none of the 8-bit and smaller floats.
DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class SafetensorsFile(TensorFile):
    def __init__(self, path: Path):
        """Opens the file and reads its header.

        Raises:
          TensorFileError: the file is damaged, of another kind, or has a dtype not in `DTYPES`.
        """
        try:
            # Held open until close(): the base class is the context manager.
            self._file = safe_open(path, framework="numpy").__enter__()
        except (SafetensorError, OSError) as error:
            raise TensorFileError(
                path, f"damaged, cut short, or not a safetensors file: {error}"
            ) from error
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        dtypes = {name: part.get_dtype() for name, part in slices.items()}
        if strange := sorted(n for n, dtype in dtypes.items() if dtype not in DTYPES):
            self.close()
            raise TensorFileError(
                path, *(f"tensor {n!r} is {dtypes[n]}, which is not read" for n in strange)
            )
        infos = {
            name: TensorInfo(shape=tuple(part.get_shape()), dtype=DTYPES[dtypes[name]])
            for name, part in slices.items()
        }
        super().__init__(path, infos, self._file.metadata())

    def read(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)

    def close(self) -> None:
        self._file.__exit__(None, None, None)
