"""Tiny checkpoints of every layout, and variations of them that the hub has."""

import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
CHECKPOINTS = GOLDENS / "checkpoints"
NAMES = ("llava15-tiny", "llava15-tiny-gqa", "llava15-13b-tiny")


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {
        name: array
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(path).items()
    }


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes())
        for n in a
    )


def side_bytes(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and "orbax" not in str(path.relative_to(folder))
        and not path.name.endswith((".safetensors", ".bin", ".safetensors.index.json"))
    }


def edited(folder: pathlib.Path, *, config: dict, drop=(), add=None) -> pathlib.Path:
    """A copy of the one-file golden at `folder` with other config values and tensors."""
    shutil.copytree(CHECKPOINTS / "llava15-tiny", folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    tensors = tensors_of(folder)
    kept = {name: array for name, array in tensors.items() if name not in drop} | (add or {})
    save_file(kept, folder / "model.safetensors")
    return folder


def tied(folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint whose head is the embedding."""
    head = "language_model.lm_head.weight"
    return edited(folder, config={"tie_word_embeddings": True}, drop=[head])
