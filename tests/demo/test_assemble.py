import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.demo.tiny_sources import dinov2_tensors
from valora_jax.demo import assemble, vit
from valora_jax.demo.smollm2 import EMBEDDING


def test_padding_rows_are_scored_like_an_average_token():
    embedding_VD = np.random.default_rng(0).standard_normal((70, 4)).astype(np.float32)
    padded_VD = assemble.padded_embedding(embedding_VD)
    assert padded_VD.shape == (128, 4)
    np.testing.assert_array_equal(padded_VD[:70], embedding_VD)
    np.testing.assert_allclose(
        padded_VD[70:] @ np.ones(4), (embedding_VD @ np.ones(4)).mean(), rtol=1e-5
    )


def test_a_full_multiple_still_gets_a_row_for_the_image_token():
    assert len(assemble.padded_embedding(np.zeros((64, 2)))) == 128


def test_projected_features_have_the_spread_of_text_embeddings():
    layers = assemble.projector(vision_width=384, text_width=576, text_rms=0.13)
    x_XD = np.random.default_rng(0).standard_normal((200, 384)) * 0.524
    hidden_XE = x_XD @ layers["linear_1.weight"].T
    # The tanh form is close enough to GELU here.
    gelu_XE = hidden_XE / 2 * (1 + np.tanh(0.79788456 * (hidden_XE + 0.044715 * hidden_XE**3)))
    out_XE = gelu_XE @ layers["linear_2.weight"].T
    assert np.sqrt(np.square(out_XE).mean()) == pytest.approx(0.13, rel=0.1)


def test_the_projector_is_the_same_every_time():
    first, second = (assemble.projector(vision_width=4, text_width=6, text_rms=1) for _ in "ab")
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_a_value_beyond_float16_is_refused_by_name():
    with pytest.raises(ValueError, match=r"norm\.weight reaches 70000, beyond float16"):
        assemble.half("norm.weight", np.array([1, -70000], np.float32))


def test_a_folder_is_written_whole(tiny, tmp_path, monkeypatch):
    _, language = tiny
    monkeypatch.setattr(vit, "read_vit", lambda _: dinov2_tensors(vit.LAYERS))
    monkeypatch.setattr(assemble, "SmolLM2", lambda _: language)
    folder, steps = tmp_path / "checkpoint", []
    folder.mkdir()
    assemble.write_checkpoint(folder, gguf=tmp_path, vision_onnx=tmp_path, step=steps.append)
    assert len(steps) == 3
    tensors = load_file(folder / "model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float16)}
    assert tensors[f"language_model.model.{EMBEDDING}"].shape == (64, 64)
    assert tensors["vision_tower.pre_layrnorm.weight"].shape == (vit.WIDTH,)
    assert tensors["multi_modal_projector.linear_1.weight"].shape == (64, vit.WIDTH)
    assert "language_model.lm_head.weight" not in tensors  # tied
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (9, 64)
    assert config["tie_word_embeddings"]
    assert config["image_seq_length"] == 256
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert tokenizer["added_tokens"][-1]["content"] == "<image>"
    assert tokenizer["added_tokens"][-1]["id"] == 9
    assert "untrained" in (folder / "README.md").read_text()
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {
        "shortest_edge": 224
    }
