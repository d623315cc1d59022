"""Writes the demo model: a LLaVA-1.5-architecture checkpoint folder in Hugging Face's layout.

The folder loads in this package and in transformers' `LlavaForConditionalGeneration`. Weights are
float16: the sources are 4 and 8 bit integers times a float16 scale, and a float32 tower, all far
within its range, and it keeps three bits more of them than bfloat16 in the same size.
"""

import importlib.resources
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken

from valora_jax.demo import vit
from valora_jax.demo.smollm2 import EMBEDDING, Dims, SmolLM2
from valora_jax.demo.wheels import LANGUAGE_MODEL, VISION_TOWER

IMAGE_TOKEN = "<image>"
PROJECTOR_SEED = 0
_ROW_MULTIPLE = 64  # embedding rows are padded to it, as LLaVA-1.5's are
_FEATURE_RMS = 0.524  # of the tower's hidden_states[-2], measured on 16 photographs
_GELU_RMS = 0.652  # of gelu(x) for a standard normal x


def padded_embedding(embedding_VD: np.ndarray) -> np.ndarray:
    """Adds `<image>` and padding rows.

    The head is tied, so the new rows are scored like tokens. The mean row is scored like an
    average token: all of them together stay below a probability of 1e-4. (Zero rows reached 0.19
    where most logits are negative.)
    """
    rows = -(-(len(embedding_VD) + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    new_VD = np.tile(embedding_VD.mean(0), (rows - len(embedding_VD), 1))
    return np.concatenate([embedding_VD, new_VD])


def projector(*, vision_width: int, text_width: int, text_rms: float) -> dict[str, np.ndarray]:
    """Random layers that give image features about the norm of text embeddings; float32.

    Untrained: they carry pictures into the language model, not their meaning.
    """
    rng = np.random.default_rng(PROJECTOR_SEED)
    up_ED = rng.standard_normal((text_width, vision_width), np.float32)
    down_EE = rng.standard_normal((text_width, text_width), np.float32)
    zeros_E = np.zeros(text_width, np.float32)
    return {
        "linear_1.weight": up_ED / (_FEATURE_RMS * vision_width**0.5),
        "linear_1.bias": zeros_E,
        "linear_2.weight": down_EE * (text_rms / (_GELU_RMS * text_width**0.5)),
        "linear_2.bias": zeros_E,
    }


def half(name: str, array: np.ndarray) -> np.ndarray:
    """The array as float16, refused if a value does not fit."""
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array, np.float16)
    if not np.isfinite(out).all():
        raise ValueError(f"{name} reaches {np.abs(array).max():g}, beyond float16")
    return out


def model_tensors(language: SmolLM2, vision_onnx: Path) -> dict[str, np.ndarray]:
    """All tensors of the checkpoint, float16, under the names `save_pretrained` writes."""
    out: dict[str, np.ndarray] = {}

    def put(prefix: str, tensors: Mapping[str, np.ndarray]) -> None:
        for name, array in tensors.items():
            out[prefix + name] = half(prefix + name, array)

    text_rms = 0.0
    for name, array in language.tensors():
        if name == EMBEDDING:
            text_rms = float(np.sqrt(np.square(array).mean()))
            array = padded_embedding(array)
        put("language_model.model.", {name: array})
    tower = vit.clip_tensors(vit.read_vit(vision_onnx), vit.PreNorm.committed())
    put("vision_tower.", tower)
    layers = projector(vision_width=vit.WIDTH, text_width=language.dims.width, text_rms=text_rms)
    put("multi_modal_projector.", layers)
    return out


def model_config(dims: Dims, *, rows: int) -> dict[str, object]:
    """The content of config.json."""
    text = {
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": dims.bos,
        "eos_token_id": dims.eos,
        "head_dim": dims.width // dims.heads,
        "hidden_act": "silu",
        "hidden_size": dims.width,
        "intermediate_size": dims.mlp_width,
        "max_position_embeddings": dims.max_tokens,
        "mlp_bias": False,
        "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers,
        "num_key_value_heads": dims.kv_heads,
        "pad_token_id": dims.pad,
        "rms_norm_eps": dims.rms_norm_eps,
        "rope_parameters": {"rope_theta": dims.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": rows,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float16",
        "image_seq_length": vit.SIDE**2,
        "image_token_index": dims.vocabulary,
        "multimodal_projector_bias": True,
        "pad_token_id": dims.pad,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": vit.clip_config(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def processor_configs() -> dict[str, dict[str, object]]:
    """The two files that say how pictures become pixels and tokens."""
    side = vit.IMAGE_SIZE
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vit.IMAGE_MEAN),
        "image_std": list(vit.IMAGE_STD),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    return {
        "preprocessor_config.json": {**image, "processor_class": "LlavaProcessor"},
        "processor_config.json": {
            "image_processor": image,
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,
            "patch_size": vit.PATCH,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    }


def _write_tokenizer(language: SmolLM2, folder: Path) -> None:
    tokenizer = language.tokenizer()
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    dims = language.dims
    config = {
        "bos_token": tokenizer.id_to_token(dims.bos),
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.id_to_token(dims.eos),
        "image_token": IMAGE_TOKEN,
        "model_max_length": dims.max_tokens,
        "pad_token": tokenizer.id_to_token(dims.pad),
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json counts as it is
    }
    _write_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(language.chat_template())


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_checkpoint(
    folder: Path, *, gguf: Path, vision_onnx: Path, step: Callable[[str], None]
) -> None:
    """Writes the whole checkpoint into an existing, empty folder.

    Args:
      folder: where to.
      gguf: SmolLM2's file out of `LANGUAGE_MODEL`.
      vision_onnx: the tower's file out of `VISION_TOWER`.
      step: told what is being done, three times.
    """
    step("reading the language model's vocabulary")
    language = SmolLM2(gguf)
    dims = language.dims
    _write_tokenizer(language, folder)
    step("converting the weights")
    tensors = model_tensors(language, vision_onnx)
    rows = len(tensors[f"language_model.model.{EMBEDDING}"])
    step("writing the checkpoint")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {"bos_token_id": dims.bos, "eos_token_id": dims.eos, "pad_token_id": dims.pad}
    _write_json(folder / "config.json", model_config(dims, rows=rows))
    _write_json(folder / "generation_config.json", ids)
    for name, config in processor_configs().items():
        _write_json(folder / name, config)
    card = (importlib.resources.files(__package__) / "model_card.md").read_text()
    (folder / "README.md").write_text(
        card.format(
            language_requirement=LANGUAGE_MODEL.requirement,
            vision_requirement=VISION_TOWER.requirement,
            seed=PROJECTOR_SEED,
            parameters=sum(array.size for array in tensors.values()),
            image_tokens=vit.SIDE**2,
            image_token=dims.vocabulary,
            rows=rows - 1,
        )
    )
