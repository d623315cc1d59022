"""Reports of what a folder holds."""

import shutil

import pytest

from tests.checkpoint.tiny_models import CHECKPOINTS, GOLDENS, edited, tied
from valora_jax.convert import hf_to_orbax, inspect_folder, peft_to_orbax
from valora_jax.errors import CheckpointError, TensorFileError

BASE, ADAPTERS = CHECKPOINTS / "llava15-tiny", GOLDENS / "adapters"


def test_a_model_is_described():
    report = inspect_folder(CHECKPOINTS / "llava15-13b-tiny")
    assert (report.kind, report.model_type, report.served) == ("model", "llava", "yes")
    assert (report.layout, report.weights.format, report.weights.files) == (
        "in_memory_4",
        "safetensors",
        3,
    )
    assert sum(report.weights.dtypes.values()) == report.weights.parameters
    assert report.chat_template
    assert report.special_tokens["eos_token"] == "</s>"
    assert "config.json" in report.side_files
    assert not report.head_is_tied


def test_orbax_is_described_as_its_source(tmp_path):
    hf_to_orbax(BASE, tmp_path / "orbax", overwrite=False, progress=False)
    source, report = inspect_folder(BASE), inspect_folder(tmp_path / "orbax")
    assert (report.weights.format, report.weights.files) == ("orbax", None)
    for field in ("model_type", "served", "layout", "layers", "vocab_rows", "side_files"):
        assert getattr(report, field) == getattr(source, field)
    assert report.weights.parameters == source.weights.parameters


def test_a_tied_head_is_not_counted(tmp_path):
    report = inspect_folder(tied(tmp_path / "tied"))
    assert report.head_is_tied
    assert report.weights.parameters == inspect_folder(BASE).weights.parameters - 704 * 128


def test_a_model_that_cannot_be_served_says_why(tmp_path):
    broken = edited(tmp_path / "broken", config={}, drop=["multi_modal_projector.linear_1.bias"])
    assert "missing from the checkpoint" in inspect_folder(broken).served
    other = edited(tmp_path / "other", config={"model_type": "qwen9"})
    report = inspect_folder(other)
    assert "model_type='qwen9'" in report.served
    assert (report.layers, report.layout) == (None, None)
    assert report.weights.tensors > 0


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    folder = shutil.copytree(BASE, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    report = inspect_folder(folder)
    assert report.tokenizer_vocabulary is None
    assert "no tokenizer.json" in report.tokenizer_problem


def test_an_adapter_is_described_and_bound(tmp_path):
    report = inspect_folder(ADAPTERS / "a09_lm_head_saved", model=BASE)
    assert (report.kind, report.peft_type, report.rank, report.ranks) == (
        "adapter",
        "LORA",
        4,
        (4,),
    )
    assert report.modules == {
        "model.language_model.layers.{i}.self_attn.q_proj": 4,
        "model.language_model.layers.{i}.self_attn.v_proj": 4,
    }
    assert report.whole_tensors == ("base_model.model.lm_head.weight",)
    assert (report.served, report.scales) == ("yes", (2.0,))
    assert "replaced head" in report.bound
    peft_to_orbax(ADAPTERS / "a09_lm_head_saved", tmp_path / "orbax", overwrite=False)
    orbax = inspect_folder(tmp_path / "orbax")
    assert (orbax.weights.format, orbax.modules, orbax.bound) == ("orbax", report.modules, None)


def test_an_adapter_that_is_not_served_says_why():
    report = inspect_folder(ADAPTERS / "a11_dora_r8", model=BASE)
    assert "use_dora" in report.served
    assert report.bound is None
    assert inspect_folder(ADAPTERS / "x01_ia3").peft_type == "IA3"


def test_a_folder_of_neither_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect_folder(tmp_path)
    with pytest.raises(ValueError, match="is not JSON"):
        inspect_folder(ADAPTERS / "bad" / "b13_config_not_json")
    with pytest.raises(TensorFileError):
        inspect_folder(ADAPTERS / "bad" / "b20_no_weights")
