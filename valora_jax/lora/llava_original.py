"""LoRA folders of the original LLaVA code: PEFT's files and `non_lora_trainables.bin`.

The latter holds whole tensors that were trained beside the LoRA, as a rule the projector, and they
replace the base's. The names are those of the original model, which has no `language_model`.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

from valora_jax.errors import AdapterError
from valora_jax.lora.adapter import Adapter, AdapterTarget
from valora_jax.lora.binding import bind
from valora_jax.lora.peft_config import read_config
from valora_jax.tensorfiles import ADAPTER_FILES, open_checkpoint, open_tensors

NON_LORA_FILE = "non_lora_trainables.bin"

_PREFIX = "base_model.model."
# The projector is a Sequential: linear, GELU, linear.
_RENAMED = (
    (r"model\.layers\.(.+)", r"model.language_model.layers.\1"),
    (r"model\.mm_projector\.0(\..+)?", r"model.multi_modal_projector.linear_1\1"),
    (r"model\.mm_projector\.2(\..+)?", r"model.multi_modal_projector.linear_2\1"),
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", r"model.vision_tower.\1"),
)


def is_llava_original(folder: str | os.PathLike[str]) -> bool:
    """Whether LLaVA's own code wrote this folder: PEFT never writes the second file."""
    return (Path(folder) / NON_LORA_FILE).is_file()


def read_llava_original(
    folder: str | os.PathLike[str], *, name: str, target: AdapterTarget
) -> Adapter:
    """Reads a LoRA folder that LLaVA's own training code wrote.

    Whole linears in `non_lora_trainables.bin` become `replaced_linears`, a `lm_head` the replaced
    head; see `combine.with_base`.

    Raises:
      AdapterError, TensorFileError: as `read_peft`.
      NotImplementedError: as `read_peft`, or other tensors than linears were trained.
    """
    folder = Path(folder)
    config = read_config(folder, name=name)
    files = open_checkpoint(folder, files=ADAPTER_FILES)
    tensors = {key: file.read(key) for file in files.stream() for key in file.names}
    with open_tensors(folder / NON_LORA_FILE) as whole:
        replaced = {_peft_key(key): whole.read(key) for key in whole.names}
    if twice := sorted(tensors.keys() & replaced.keys()):
        raise AdapterError(name, [f"{key}: also in {NON_LORA_FILE}" for key in twice])
    # All of the second file was trained, so the config need not name its modules as saved.
    modules = tuple({key.removeprefix(_PREFIX).rpartition(".")[0] for key in replaced})
    return bind(
        tensors | replaced,
        config=dataclasses.replace(config, modules_to_save=(*config.modules_to_save, *modules)),
        target=dataclasses.replace(target, canonical_name=_canonical(target.canonical_name)),
        name=name,
        source=f"LLaVA LoRA folder {folder}, trained on {config.base_model}",
    )


def _peft_key(key: str) -> str:
    """Checkpoints written while the LoRA was being merged lack the wrapper's prefix."""
    return key if key.startswith(_PREFIX) else _PREFIX + key


def _canonical(canonical_name: Callable[[str], str]) -> Callable[[str], str]:
    def rename(module: str) -> str:
        for pattern, ours in _RENAMED:
            if match := re.fullmatch(pattern, module):
                return match.expand(ours)
        return canonical_name(module)

    return rename
