"""Random stand-ins, small, for the two files the demo model is made of."""

import gguf
import numpy as np

from valora_jax.demo import vit

RNG = np.random.default_rng(0)
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% endfor %}"
)
CHARACTERS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "1", "ab", "Ġab"]


def random(*shape):
    return RNG.standard_normal(shape, np.float32)


def dinov2_tensors(layers):
    """Tensors as `read_vit` gives them, random, of the real width."""
    d, f = vit.WIDTH, 8
    out = {
        "embeddings.cls_token": random(1, 1, d),
        vit.CLASS_POSITION: random(1, d),
        vit.PATCH_POSITIONS: random(9, d),
        vit.PATCH_KERNEL: random(d, 3, vit.PATCH, vit.PATCH),
        "embeddings.patch_embeddings.projection.bias": random(d),
        "layernorm.weight": random(d),
        "layernorm.bias": random(d),
    }
    for i in range(layers):
        at = f"encoder.layer.{i}."
        for linear in ("attention.query", "attention.key", "attention.value", "output.dense"):
            out[f"{at}attention.{linear}.weight"] = random(d, d)
            out[f"{at}attention.{linear}.bias"] = random(d)
        out |= {f"{at}mlp.fc1.weight": random(f, d), f"{at}mlp.fc1.bias": random(f)}
        out |= {f"{at}mlp.fc2.weight": random(d, f), f"{at}mlp.fc2.bias": random(d)}
        for index in (1, 2):
            out[f"{at}norm{index}.weight"], out[f"{at}norm{index}.bias"] = random(d), random(d)
            out[f"{at}layer_scale{index}.lambda1"] = random(d)
    return out


def write_gguf(path):
    """Writes a model of one layer; returns its weights, float32, by llama.cpp's names."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(len(CHARACTERS))
    writer.add_context_length(128)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(CHARACTERS)
    writer.add_token_types([3, 3, 3] + [1] * (len(CHARACTERS) - 3))
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd": (9, 64), "output_norm": (64,), "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96),
    }  # fmt: skip
    weights = {name: RNG.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, array in weights.items():
        if name.endswith("ffn_up"):
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(array, kind)
            weights[name] = gguf.quants.dequantize(packed, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
