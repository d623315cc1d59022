import json

import numpy as np
import pytest

from tests.lora.llava_tiny import TARGET
from tests.tensorfiles import torch_writer
from valora_jax.errors import AdapterError, TensorFileError
from valora_jax.lora.read import read_adapter

CONFIG = dict(
    base_model_name_or_path="lmsys/vicuna-7b-v1.5",
    bias="none",
    fan_in_fan_out=False,
    inference_mode=True,
    lora_alpha=16,
    lora_dropout=0.05,
    modules_to_save=None,
    peft_type="LORA",
    r=8,
    target_modules=["q_proj", "down_proj"],
    task_type="CAUSAL_LM",
)


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


LORA = {
    "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": array(8, 128),
    "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight": array(128, 8),
    "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": array(8, 192),
    "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": array(128, 8),
}
PROJECTOR = {
    "model.mm_projector.0.weight": array(128, 64, seed=1),
    "model.mm_projector.0.bias": array(128, seed=2),
    "model.mm_projector.2.weight": array(128, 128, seed=3),
    "model.mm_projector.2.bias": array(128, seed=4),
}


@pytest.fixture
def folder(tmp_path):
    def write(whole: dict[str, np.ndarray], *, prefix: str = "base_model.model."):
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
        named = {prefix + key: tensor for key, tensor in whole.items()}
        for name, tensors in (("adapter_model", LORA), ("non_lora_trainables", named)):
            views = {
                key: torch_writer.whole(str(i), tensor)
                for i, (key, tensor) in enumerate(tensors.items())
            }
            (tmp_path / f"{name}.bin").write_bytes(torch_writer.zip_bytes(views))
        return tmp_path

    return write


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_the_layers_are_adapted_and_the_projector_replaced(folder, prefix):
    adapter = read_adapter(folder(PROJECTOR, prefix=prefix), name="x", target=TARGET)
    assert adapter.bound() == (
        "decoder q of layers 2, rank 8; decoder down of 1 layer, rank 8; "
        "projector linear_1, linear_2 of 1 layer, replaced"
    )
    np.testing.assert_array_equal(
        adapter.pairs["decoder.q"][2].a_RK,
        LORA["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"],
    )
    for site, index in (("projector.linear_1", 0), ("projector.linear_2", 2)):
        linear = adapter.replaced_linears[site][0]
        weight_NK = PROJECTOR[f"model.mm_projector.{index}.weight"]
        np.testing.assert_array_equal(linear.weight_NK, weight_NK)
        np.testing.assert_array_equal(linear.bias_N, PROJECTOR[f"model.mm_projector.{index}.bias"])
    assert adapter.needs_base


def test_a_linear_of_the_vision_tower_and_the_head_are_replaced(folder):
    tower = "model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1"
    whole = {f"{tower}.weight": array(160, 64), f"{tower}.bias": array(160)}
    adapter = read_adapter(
        folder(whole | {"lm_head.weight": array(704, 128)}), name="x", target=TARGET
    )
    assert set(adapter.replaced_linears["vision.fc1"]) == {1}
    assert adapter.replaced_head_VD.shape == (704, 128)


def test_what_is_no_linear_is_refused(folder):
    whole = PROJECTOR | {"model.embed_tokens.weight": array(704, 128)}
    with pytest.raises(NotImplementedError, match=r"a replaced model\.embed_tokens"):
        read_adapter(folder(whole), name="x", target=TARGET)


def test_a_projector_of_another_model_lists_every_fault(folder):
    whole = PROJECTOR | {
        "model.mm_projector.0.weight": array(128, 32),
        "model.mm_projector.2.bias": array(64),
    }
    with pytest.raises(AdapterError) as error:
        read_adapter(folder(whole), name="x", target=TARGET)
    for fault in (
        "model.mm_projector.0.weight: shape (128, 32), want (128, 64)",
        "model.mm_projector.2.bias: shape (64,), want (128,)",
    ):
        assert fault in str(error.value)


def test_a_damaged_second_file_is_named(folder):
    path = folder(PROJECTOR)
    (path / "non_lora_trainables.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(TensorFileError, match=r"non_lora_trainables\.bin"):
        read_adapter(path, name="x", target=TARGET)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(AdapterError, match=r"gone: no such folder"):
        read_adapter(tmp_path / "gone", name="x", target=TARGET)
