import importlib.resources
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.demo.tiny_sources import RNG, dinov2_tensors, random
from valora_jax.demo import vit

# torch 2.13: interpolate((arange(G * G) ** 2 % 11).reshape(G, G), mode="bicubic")
FROM_TORCH = {
    (5, 3): [
        [1.1364894, 4.5370369, 6.2040477],
        [0.6296298, 1.0, 7.5925908],
        [3.7153637, 1.0555558, 4.6179676],
    ],
    (3, 4): [
        [-0.7435334, -0.1458046, 2.0725625, 4.3128695],
        [6.6211138, 4.6824694, 2.9356947, 2.6396284],
        [7.9980073, 6.342227, 5.0376563, 5.0244532],
        [2.3948693, 3.6373391, 6.8636374, 9.7486858],
    ],
}


def layer_norm(x_XD, norm):
    centred_XD = x_XD - x_XD.mean(-1, keepdims=True)
    spread_X1 = np.sqrt(x_XD.var(-1, keepdims=True) + vit.LAYER_NORM_EPS)
    return centred_XD / spread_X1 * norm.weight_D + norm.bias_D


@pytest.mark.parametrize(("size", "side"), FROM_TORCH)
def test_positions_are_resized_as_torch_does(size, side):
    table_GGD = (np.arange(size * size) ** 2 % 11).astype(np.float32).reshape(size, size, 1)
    got = vit.resize_positions(table_GGD, side)[..., 0]
    np.testing.assert_allclose(got, FROM_TORCH[size, side], atol=2e-6)


def test_a_table_of_the_right_size_stays_as_it_is():
    table_GGD = random(4, 4, 3)
    np.testing.assert_allclose(vit.resize_positions(table_GGD, 4), table_GGD, atol=1e-6)


def test_layer_scales_multiply_the_rows_of_the_linear_before_them():
    theirs = dinov2_tensors(layers=1)
    ours = vit.clip_tensors(theirs, vit.PreNorm.committed(), layers=1)
    x_F = random(8)
    want_D = theirs["encoder.layer.0.mlp.fc2.weight"] @ x_F + theirs["encoder.layer.0.mlp.fc2.bias"]
    want_D *= theirs["encoder.layer.0.layer_scale2.lambda1"]
    at = "encoder.layers.0.mlp.fc2"
    np.testing.assert_allclose(ours[f"{at}.weight"] @ x_F + ours[f"{at}.bias"], want_D, rtol=1e-4)


def test_the_tower_has_the_names_and_shapes_of_a_clip_vision_model():
    ours = vit.clip_tensors(dinov2_tensors(layers=2), vit.PreNorm.committed(), layers=2)
    assert len(ours) == 7 + 16 * 2
    assert ours["embeddings.position_embedding.weight"].shape == (1 + vit.SIDE**2, vit.WIDTH)
    assert ours["embeddings.class_embedding"].shape == (vit.WIDTH,)
    assert ours["encoder.layers.1.self_attn.out_proj.weight"].shape == (vit.WIDTH, vit.WIDTH)


def test_the_committed_norm_gives_tokens_of_a_photograph_s_spread_back():
    norm = vit.PreNorm.committed()
    spread_X1 = RNG.uniform(0.03, 0.2, (64, 1))  # tokens differ this much in spread
    tokens_XD = RNG.standard_normal((64, vit.WIDTH)) * spread_X1
    tokens_XD -= tokens_XD.mean(-1, keepdims=True)
    got_XD = layer_norm(vit.anchored(tokens_XD, norm.anchor_channels), norm)
    others = np.setdiff1d(np.arange(vit.WIDTH), norm.anchor_channels)
    error_XD = (got_XD - tokens_XD)[:, others]
    assert np.linalg.norm(error_XD) < 0.05 * np.linalg.norm(tokens_XD)


def test_the_class_token_comes_out_of_the_norm_as_it_was():
    theirs = dinov2_tensors(layers=0)
    norm = vit.PreNorm.committed()
    want_D = norm.bias_D + norm.weight_D * layer_norm(
        random(1, vit.WIDTH),
        vit.PreNorm(anchor_channels=(0, 1), weight_D=np.float32(1), bias_D=np.float32(0)),
    )
    theirs["embeddings.cls_token"] = want_D - theirs[vit.CLASS_POSITION]
    ours = vit.clip_tensors(theirs, norm, layers=0)
    first = ours["embeddings.class_embedding"] + ours["embeddings.position_embedding.weight"][0]
    np.testing.assert_allclose(layer_norm(first[None], norm), want_D, atol=1e-5)


def test_nameless_onnx_weights_are_named_by_the_node_that_uses_them(tmp_path):
    weights = {
        "backbone.layernorm.bias": random(3),
        "decoder.bias": random(3),
        "onnx::MatMul_7": random(3, 2),
        "onnx::MatMul_8": random(3, 2),
        "onnx::Concat_9": random(1, 1, 3),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/backbone/a.0/b/MatMul"),
        helper.make_node("MatMul", ["x", "onnx::MatMul_8"], ["z"], name="/decoder/MatMul"),
        helper.make_node("Concat", ["onnx::Concat_9", "x"], ["w"], axis=0,
                         name="/backbone/embeddings/Concat_6"),
    ]  # fmt: skip
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "tiny", [value("x", TensorProto.FLOAT, [1, 1, 3])],
        [value("y", TensorProto.FLOAT, None)], initializers,
    )  # fmt: skip
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph), str(path))
    got = vit.read_vit(path)
    assert got.keys() == {"layernorm.bias", "a.0.b.weight", vit.CLASS_POSITION}
    np.testing.assert_array_equal(got["a.0.b.weight"], weights["onnx::MatMul_7"].T)
    assert got[vit.CLASS_POSITION].shape == (1, 3)


def test_the_committed_numbers_say_how_they_were_made():
    package = importlib.resources.files("valora_jax.demo")
    record = json.loads((package / "pre_layrnorm.json").read_text())
    assert "CC0" in record["photographs"]
    assert record["relative_error"] < 0.05
    assert len(record["weight"]) == len(record["bias"]) == vit.WIDTH
