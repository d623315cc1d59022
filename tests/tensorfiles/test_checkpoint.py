import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from valora_jax.errors import TensorFileError
from valora_jax.tensorfiles import ADAPTER_FILES, open_checkpoint, open_tensors

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens" / "adapters"
INDEX = "model.safetensors.index.json"


def write_shards(folder, shards: dict[str, list[str]], weight_map: dict[str, str]) -> None:
    for shard, names in shards.items():
        save_file({name: np.full(2, len(name), np.float32) for name in names}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_torch_shards_stream_one_by_one_and_equal_their_twin():
    checkpoint = open_checkpoint(GOLDENS / "qwenvl_bin_sample")
    streamed = {n: file.read(n) for file in checkpoint.stream() for n in file.names}
    assert len(checkpoint.shards) == 2
    assert set(streamed) == set(checkpoint.names)
    assert checkpoint.size_bytes == sum(array.nbytes for array in streamed.values())
    with open_tensors(GOLDENS / "qwenvl_bin_sample" / "same.safetensors") as twin:
        assert set(twin.names) == set(checkpoint.names)
        for name in twin.names:
            assert checkpoint.dtype(name) == twin.dtype(name)
            assert checkpoint.shape(name) == twin.shape(name)
            np.testing.assert_array_equal(streamed[name], twin.read(name))
            np.testing.assert_array_equal(checkpoint.read(name), streamed[name])


def test_one_file_comes_before_an_index_and_files_can_be_named(tmp_path):
    write_shards(tmp_path, {"s.safetensors": ["a"]}, {"a": "s.safetensors"})
    assert open_checkpoint(tmp_path).names == ("a",)
    save_file({"b": np.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).names == ("b",)
    save_file({"c": np.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert open_checkpoint(tmp_path, files=ADAPTER_FILES).names == ("c",)


def test_a_folder_without_tensors_says_what_it_looked_for(tmp_path):
    with pytest.raises(TensorFileError, match=r"none of model\.safetensors, .*index\.json in it"):
        open_checkpoint(tmp_path)


def test_every_disagreement_of_index_and_shards_is_listed(tmp_path):
    shards = {"1.safetensors": ["a", "stray"], "2.safetensors": ["b", "c"]}
    places = dict(a="1.safetensors", b="2.safetensors", c="1.safetensors")
    places |= dict(gone="3.safetensors", outside="../2.safetensors")
    write_shards(tmp_path, shards, places)
    with pytest.raises(TensorFileError) as error:
        open_checkpoint(tmp_path)
    for fault in (
        "c is not in 1.safetensors",
        "1.safetensors holds stray, which the index places in no shard",
        "2.safetensors holds c, which the index places in 1.safetensors",
        "shard '3.safetensors' is missing",
        "shard '../2.safetensors' is missing",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(TensorFileError, match=r"index\.json: "):
        open_checkpoint(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    write_shards(tmp_path, {"s.safetensors": ["a"]}, {"a": "s.safetensors"})
    (tmp_path / "s.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(TensorFileError, match=r"s\.safetensors: damaged"):
        open_checkpoint(tmp_path)
