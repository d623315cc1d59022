import json
import pathlib

import pytest
from transformers import LlavaConfig

from valora_jax.errors import CheckpointError
from valora_jax.models.llava15.config import LLAVA_1_5_7B, LLAVA_1_5_13B, Llava15Config

CHECKPOINTS = pathlib.Path(__file__).parent.parent / "goldens" / "checkpoints"

# What llava-hf/llava-1.5-7b-hf publishes: LlamaConfig's and CLIPVisionConfig's defaults left out.
HUB_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
SIZES_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}


def hub(*, text=None, vision=None, **top):
    """The hub's config with some values changed; None leaves a key out."""
    changed = {
        **HUB_7B,
        "text_config": HUB_7B["text_config"] | (text or {}),
        "vision_config": HUB_7B["vision_config"] | (vision or {}),
        **top,
    }
    return {key: value for key, value in changed.items() if value is not None}


def test_the_hubs_partial_config_is_the_published_7b():
    assert Llava15Config.from_hf(HUB_7B) == LLAVA_1_5_7B
    assert LLAVA_1_5_7B.tokens_per_image == 576
    assert LLAVA_1_5_7B.vision_blocks_used == 23


def test_13b_differs_by_numbers_only():
    assert Llava15Config.from_hf(hub(text=SIZES_13B)) == LLAVA_1_5_13B


PARTIAL = {
    "hub_7b": HUB_7B,
    "nothing": {"model_type": "llava"},
    "empty_sections": {"model_type": "llava", "text_config": {}, "vision_config": {}},
    "nulls": hub(text={"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}),
    "grouped": hub(text={"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}),
    "old_rope": hub(text={"rope_theta": 5e5, "rope_scaling": {"type": "default"}}),
    "new_rope": hub(text={"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}),
    "tied_in_text": hub(text={"tie_word_embeddings": True}),
    "tied_on_top": hub(tie_word_embeddings=True),
    "full": hub(vision_feature_select_strategy="full", vision_feature_layer=-1),
    "new_names": hub(torch_dtype=None, dtype="bfloat16"),
    "plain_gelu": hub(vision={"hidden_act": "gelu", "layer_norm_eps": 1e-6}),
}
PARTIAL |= {
    path.parent.name: json.loads(path.read_text()) for path in CHECKPOINTS.glob("*/config.json")
}


@pytest.mark.parametrize("hf", PARTIAL.values(), ids=PARTIAL.keys())
def test_defaults_are_filled_in_as_transformers_does(hf):
    ours = Llava15Config.from_hf(hf)
    full = LlavaConfig.from_dict(json.loads(json.dumps(hf)))
    text, vision = full.text_config, full.vision_config
    # What transformers writes is a complete config of the same model.
    assert Llava15Config.from_hf(json.loads(full.to_json_string(use_diff=False))) == ours
    decoder, tower = ours.decoder, ours.vision
    assert decoder.vocab_rows == text.vocab_size
    assert decoder.width == text.hidden_size
    assert decoder.layers == text.num_hidden_layers
    assert decoder.heads == text.num_attention_heads
    assert decoder.kv_heads == text.num_key_value_heads
    assert decoder.head_width == text.head_dim
    assert decoder.mlp_width == text.intermediate_size
    assert decoder.norm_eps == text.rms_norm_eps
    assert decoder.rope_theta == text.rope_parameters["rope_theta"]
    assert decoder.max_positions == text.max_position_embeddings
    assert decoder.tied == full.tie_word_embeddings
    assert tower.width == vision.hidden_size
    assert tower.layers == vision.num_hidden_layers
    assert tower.heads == vision.num_attention_heads
    assert tower.mlp_width == vision.intermediate_size
    assert tower.patch_size == vision.patch_size
    assert tower.image_size == vision.image_size
    assert tower.activation == vision.hidden_act
    assert tower.norm_eps == vision.layer_norm_eps
    assert ours.image_token_id == full.image_token_index
    assert ours.feature_layer == full.vision_feature_layer
    assert ours.keep_class_token == (full.vision_feature_select_strategy == "full")


def test_the_full_strategy_keeps_the_class_token():
    config = Llava15Config.from_hf(hub(vision_feature_select_strategy="full"))
    assert config.tokens_per_image == 577


@pytest.mark.parametrize(
    ("layer", "blocks"), [(-1, 24), (-2, 23), (-25, 0), (0, 0), (1, 1), (24, 24)]
)
def test_the_feature_layer_counts_hidden_states(layer, blocks):
    assert Llava15Config.from_hf(hub(vision_feature_layer=layer)).vision_blocks_used == blocks


UNPORTED = {
    "projector_hidden_act": hub(projector_hidden_act="gelu_pytorch_tanh"),
    "multimodal_projector_bias": hub(multimodal_projector_bias=False),
    "vision_feature_layer": hub(vision_feature_layer=[-2, -5]),
    "vision_feature_select_strategy": hub(vision_feature_select_strategy="cls"),
    "text_config.model_type": hub(text={"model_type": "mistral"}),
    "text_config.hidden_act": hub(text={"hidden_act": "gelu"}),
    "text_config.attention_bias": hub(text={"attention_bias": True}),
    "text_config.mlp_bias": hub(text={"mlp_bias": True}),
    "text_config.rope_scaling.type": hub(text={"rope_scaling": {"type": "linear", "factor": 2}}),
    "text_config.rope_parameters.rope_type": hub(text={"rope_parameters": {"rope_type": "yarn"}}),
    "vision_config.model_type": hub(vision={"model_type": "siglip_vision_model"}),
    "vision_config.hidden_act": hub(vision={"hidden_act": "relu"}),
    "vision_config.num_channels": hub(vision={"num_channels": 1}),
    "vision_config.image_size": hub(vision={"image_size": 337}),
    "dtype": hub(dtype="float64"),
}


@pytest.mark.parametrize(("key", "hf"), UNPORTED.items(), ids=UNPORTED.keys())
def test_what_is_legal_but_not_ported_is_refused_by_name(key, hf):
    with pytest.raises(NotImplementedError, match=f"config.json: {key}="):
        Llava15Config.from_hf(hf)


MALFORMED = {
    "model_type=None": {},
    "model_type='nosuchmodel'": hub(model_type="nosuchmodel"),
    "text_config=7": {"model_type": "llava", "text_config": 7},
    "text_config.hidden_size='wide'": hub(text={"hidden_size": "wide"}),
    "text_config.num_hidden_layers=0": hub(text={"num_hidden_layers": 0}),
    "text_config.num_attention_heads=32 ": hub(text={"num_key_value_heads": 5}),
    "text_config.head_dim=3 ": hub(text={"head_dim": 3}),
    "text_config.rms_norm_eps=nan": hub(text={"rms_norm_eps": float("nan")}),
    "text_config.tie_word_embeddings='no'": hub(text={"tie_word_embeddings": "no"}),
    "vision_config.hidden_size=1024 ": hub(vision={"num_attention_heads": 7}),
    "vision_config.patch_size=True": hub(vision={"patch_size": True}),
    "image_token_index=-1": hub(image_token_index=-1),
}


@pytest.mark.parametrize(("fault", "hf"), MALFORMED.items(), ids=MALFORMED.keys())
def test_a_malformed_value_is_refused_with_the_value(fault, hf):
    with pytest.raises(CheckpointError, match=f"config.json: {fault}"):
        Llava15Config.from_hf(hf)


def test_all_faults_of_a_config_are_listed_together():
    hf = hub(text={"hidden_size": -1, "mlp_bias": True}, vision={"patch_size": "14"})
    with pytest.raises(CheckpointError) as error:
        Llava15Config.from_hf(hf)
    for part in ("hidden_size=-1", "mlp_bias=True", "patch_size='14'"):
        assert part in str(error.value)
