"""`valora convert` at the command line: flags, exit codes, and one clear line for a mistake."""

import json

import pytest
import tyro

from tests.checkpoint.tiny_models import CHECKPOINTS, GOLDENS, same_bits, tensors_of
from valora_jax.cli.convert import ConvertCommand, run

BASE, ADAPTERS = CHECKPOINTS / "llava15-tiny", GOLDENS / "adapters"


def valora_convert(*args):
    return run(tyro.cli(ConvertCommand, args=[str(arg) for arg in args]))


def test_a_model_goes_there_and_back(tmp_path):
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    assert valora_convert("hf-to-orbax", BASE, orbax, "--no-progress") == 0
    assert valora_convert("orbax-to-hf", orbax, back, "--max-shard-gb", "0.001") == 0
    assert len(list(back.glob("*.safetensors"))) == 2
    assert same_bits(tensors_of(back), tensors_of(BASE))


def test_an_adapter_goes_there_and_back(tmp_path):
    source = ADAPTERS / "a01_attn_lm_r8"
    assert valora_convert("peft-to-orbax", source, tmp_path / "orbax") == 0
    assert valora_convert("orbax-to-peft", tmp_path / "orbax", tmp_path / "back") == 0
    assert same_bits(tensors_of(tmp_path / "back"), tensors_of(source))


def test_merge_takes_named_and_weighted_adapters(tmp_path):
    one, two = ADAPTERS / "a01_attn_lm_r8", ADAPTERS / "a19_attn_lm_r8_b"
    adapters = ["--adapter", f"cars={one}", "--adapter", two, "--weight", "0.5", "--weight", "-1"]
    merge = ["merge", "--model", BASE, tmp_path / "merged", "--no-progress"]
    assert valora_convert(*merge, *adapters) == 0
    assert not same_bits(tensors_of(tmp_path / "merged"), tensors_of(BASE))
    assert valora_convert(*merge, *adapters) == 1  # it is there already
    assert valora_convert(*merge, *adapters, "--overwrite") == 0


def test_inspect_prints_a_table_or_json(capsys):
    assert valora_convert("inspect", BASE) == 0
    assert "952,704" in capsys.readouterr().out
    adapter = ADAPTERS / "a01_attn_lm_r8"
    assert valora_convert("inspect", adapter, "--model", BASE, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bound"] == "decoder q, k, v, o of 4 layers, rank 8"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "nowhere"], "config.json: no such folder"),
        (["hf-to-orbax", "nowhere", "out"], "config.json: no such folder"),
        (["merge", "--model", BASE, "out"], "no adapter to merge"),
        (["merge", "--model", BASE, "--adapter", "nowhere", "out"], "nowhere: no such folder"),
        (
            ["merge", "--model", BASE, "--adapter", "x", "--weight", "1", "--weight", "2", "out"],
            "1 adapters and 2 weights",
        ),
        (["merge", "--model", BASE, "--adapter", ADAPTERS / "x01_ia3", "out"], "only LORA"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    assert valora_convert(*args) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("valora convert: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []
