"""Adapter folders go to Orbax and back with the same bits."""

import pytest

from tests.checkpoint.tiny_models import GOLDENS, same_bits, side_bytes, tensors_of
from valora_jax.convert import orbax_to_peft, peft_to_orbax
from valora_jax.errors import AdapterError, TensorFileError
from valora_jax.tensorfiles import open_tensors

ADAPTERS = GOLDENS / "adapters"


def round_trip(source, tmp_path):
    peft_to_orbax(source, tmp_path / "orbax", overwrite=False)
    orbax_to_peft(tmp_path / "orbax", tmp_path / "back", overwrite=False)
    return tmp_path / "back"


@pytest.mark.parametrize("name", ["a03_all_linear_lm_r16", "a10_new_head", "x01_ia3"])
def test_a_round_trip_changes_nothing(tmp_path, name):
    back = round_trip(ADAPTERS / name, tmp_path)
    assert same_bits(tensors_of(back), tensors_of(ADAPTERS / name))
    assert side_bytes(back) == side_bytes(ADAPTERS / name)


def test_a_bin_file_comes_back_as_safetensors(tmp_path):
    back = round_trip(ADAPTERS / "a21_binfile", tmp_path)
    with open_tensors(ADAPTERS / "a21_binfile" / "adapter_model.bin") as file:
        assert same_bits(tensors_of(back), {name: file.read(name) for name in file.names})
    assert not (back / "adapter_model.bin").exists()


def test_what_llava_trained_beside_its_lora_goes_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in (ADAPTERS / "a21_binfile").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "non_lora_trainables.bin").write_bytes(b"as it is")
    back = round_trip(source, tmp_path)
    assert (back / "non_lora_trainables.bin").read_bytes() == b"as it is"


@pytest.mark.parametrize(
    ("name", "error"),
    [("b12_no_config", AdapterError), ("b20_no_weights", TensorFileError)],
)
def test_half_an_adapter_is_refused(tmp_path, name, error):
    with pytest.raises(error):
        peft_to_orbax(ADAPTERS / "bad" / name, tmp_path / "orbax", overwrite=False)
    assert not (tmp_path / "orbax").exists()
