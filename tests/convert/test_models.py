"""Model folders go to Orbax and back with the same bits, names and side files."""

import shutil

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.tiny_models import (
    CHECKPOINTS,
    NAMES,
    edited,
    same_bits,
    side_bytes,
    tensors_of,
    tied,
)
from valora_jax.convert import hf_to_orbax, orbax_to_hf
from valora_jax.errors import CheckpointError, TensorFileError
from valora_jax.tensorfiles import open_checkpoint


def round_trip(source, tmp_path, **options):
    hf_to_orbax(source, tmp_path / "orbax", overwrite=False, progress=False)
    orbax_to_hf(tmp_path / "orbax", tmp_path / "back", overwrite=False, progress=False, **options)
    return tmp_path / "back"


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_changes_nothing(tmp_path, name):
    source = CHECKPOINTS / name
    back = round_trip(source, tmp_path)
    assert same_bits(tensors_of(back), tensors_of(source))
    assert side_bytes(back) == side_bytes(source) == side_bytes(tmp_path / "orbax")


def test_the_model_card_and_folders_go_along_and_other_weights_stay(tmp_path):
    source = shutil.copytree(CHECKPOINTS / "llava15-tiny", tmp_path / "source")
    (source / "README.md").write_bytes(b"---\r\nlicense: llama2\n---\n")
    (source / "assets").mkdir()
    (source / "assets" / "cat.png").write_bytes(b"\x89PNG")
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("")
    (source / "pytorch_model.bin").write_bytes(b"the same again")
    back = round_trip(source, tmp_path)
    names = {str(p.relative_to(back)) for p in back.rglob("*") if p.is_file()}
    assert {"README.md", "assets/cat.png", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", ".git/config", "valora_orbax.json"}
    assert (back / "README.md").read_bytes() == (source / "README.md").read_bytes()


def test_weights_above_the_limit_become_shards_with_an_index(tmp_path):
    source = CHECKPOINTS / "llava15-tiny"
    back = round_trip(source, tmp_path, max_shard_bytes=500_000)
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-0000{len(shards)}.safetensors"
    assert len(shards) == 5
    assert same_bits(tensors_of(back), tensors_of(source))
    assert open_checkpoint(back).size_bytes == open_checkpoint(source).size_bytes
    for shard in open_checkpoint(back).stream():
        assert sum(info.size_bytes for info in shard.infos.values()) <= 500_000
        assert shard.metadata == {"format": "pt"}


def test_a_tied_head_stays_out_of_the_file(tmp_path):
    source = tied(tmp_path / "tied")
    assert same_bits(tensors_of(round_trip(source, tmp_path)), tensors_of(source))


def test_a_tied_head_that_was_written_all_the_same_is_kept(tmp_path):
    source = edited(tmp_path / "source", config={"tie_word_embeddings": True})
    assert same_bits(tensors_of(round_trip(source, tmp_path)), tensors_of(source))


def test_buffers_and_mixed_dtypes_are_kept(tmp_path):
    more = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(17, dtype=np.int64)[None],
        "multi_modal_projector.linear_1.bias": np.full(128, 0.1, np.float32),
        "multi_modal_projector.linear_2.bias": np.full(128, 0.1, ml_dtypes.bfloat16),
    }
    source = edited(tmp_path / "source", config={}, add=more)
    assert same_bits(tensors_of(round_trip(source, tmp_path)), tensors_of(source))


def test_a_broken_checkpoint_leaves_nothing_behind(tmp_path):
    source = edited(tmp_path / "in", config={}, drop=["multi_modal_projector.linear_1.bias"])
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: .*linear_1.bias"):
        hf_to_orbax(source, tmp_path / "out" / "orbax", overwrite=False, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_is_no_model(tmp_path):
    adapter = CHECKPOINTS.parent / "adapters" / "a01_attn_lm_r8"
    with pytest.raises(CheckpointError, match=r"config.json: No such file"):
        hf_to_orbax(adapter, tmp_path / "orbax", overwrite=False, progress=False)
    with pytest.raises(TensorFileError, match="no Orbax folder"):
        orbax_to_hf(adapter, tmp_path / "hf", overwrite=False, progress=False)


def test_a_changed_config_is_noticed_on_the_way_back(tmp_path):
    hf_to_orbax(CHECKPOINTS / "llava15-tiny", tmp_path / "orbax", overwrite=False, progress=False)
    shutil.copy(CHECKPOINTS / "llava15-13b-tiny" / "config.json", tmp_path / "orbax")
    with pytest.raises(CheckpointError, match=r"decoder.embedding: shape \(704, 128\), want"):
        orbax_to_hf(tmp_path / "orbax", tmp_path / "back", overwrite=False, progress=False)


def test_a_shard_must_hold_something(tmp_path):
    with pytest.raises(ValueError, match="a shard of 0 bytes"):
        round_trip(CHECKPOINTS / "llava15-tiny", tmp_path, max_shard_bytes=0)
