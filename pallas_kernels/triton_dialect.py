"""Names Triton's dialect where MLIR's Python bindings look for it.

They import a module for the dialect of every value they see, until they have found it once. jaxlib
has Triton's elsewhere, so that each value of a kernel cost a failing search of the file system:
more than half of the time that lowering a kernel took.
"""

import sys

from jaxlib.triton import dialect

# Only whether the import succeeds matters: the dialect has registered itself when it was imported.
sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)
