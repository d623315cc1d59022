import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from valora_jax.errors import CheckpointError, TensorFileError
from valora_jax.models.loading import load_weights, read_config
from valora_jax.models.weight_map import Entry

QKV = Entry({f"{name}.weight": (4, 3) for name in "qkv"}, "qkv.kernel", "transposed")
NORM = Entry({"norm.weight": (3,)}, "norm.scale")
ENTRIES = (NORM, QKV)


def tensors(dtype=np.float16):
    rng = np.random.default_rng(0)
    shapes = NORM.hf | QKV.hf
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, *shards):
    """One file, or shards with an index."""
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    names = [f"model-{i:05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    weight_map = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def load(folder, entries=ENTRIES, *, dtype=None, **kwargs):
    kwargs = {"canonical": lambda name: name.removeprefix("old."), "progress": False} | kwargs
    return load_weights(folder, entries, ignored=("inv_freq",), dtype=dtype, **kwargs)


def faults_of(folder, **kwargs):
    with pytest.raises(CheckpointError) as error:
        load(folder, **kwargs)
    return str(error.value)


def test_parameters_arrive_in_our_layout_on_the_device(tmp_path):
    hf = tensors()
    weights = load(write(tmp_path, hf))
    assert all(isinstance(weight, jax.Array) for weight in weights.values())
    np.testing.assert_array_equal(weights["norm.scale"], hf["norm.weight"])
    qkv = np.concatenate([hf[f"{name}.weight"] for name in "qkv"]).T
    np.testing.assert_array_equal(weights["qkv.kernel"], qkv)


def test_a_parameter_whose_parts_lie_in_three_shards_is_whole(tmp_path):
    hf = tensors()
    together, apart = tmp_path / "together", tmp_path / "apart"
    together.mkdir()
    apart.mkdir()
    want = load(write(together, hf))
    got = load(write(apart, *({name: array} for name, array in hf.items())))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_float_is_cast_to_every_other(tmp_path, stored, dtype):
    hf = tensors(stored)
    norm = load(write(tmp_path, hf), dtype=dtype)["norm.scale"]
    np.testing.assert_array_equal(np.asarray(norm), hf["norm.weight"].astype(dtype))


def test_without_a_dtype_each_parameter_keeps_its_own(tmp_path):
    hf = tensors() | {"norm.weight": np.ones(3, np.float32)}
    weights = load(write(tmp_path, hf))
    assert {path: w.dtype.name for path, w in weights.items()} == {
        "norm.scale": "float32",
        "qkv.kernel": "float16",
    }


def test_parts_of_different_dtypes_need_one_to_cast_to(tmp_path):
    write(tmp_path, tensors() | {"k.weight": np.ones((4, 3), np.float32)})
    assert "qkv.kernel: its parts differ in dtype" in faults_of(tmp_path)
    assert load(tmp_path, dtype="float32")["qkv.kernel"].dtype == np.float32


def test_names_are_made_canonical_and_buffers_ignored(tmp_path):
    hf = {f"old.{name}": array for name, array in tensors().items()}
    weights = load(write(tmp_path, hf | {"rotary.inv_freq": np.ones(2, np.int64)}))
    assert weights.keys() == {"norm.scale", "qkv.kernel"}


def test_a_wrong_checkpoint_lists_every_fault_by_the_files_names(tmp_path):
    hf = {
        "old.norm.weight": np.ones(5, np.float16),
        "q.weight": np.ones((4, 3), np.int8),
        "k.weight": np.ones((4, 3), np.float16),
        "old.k.weight": np.ones((4, 3), np.float16),
        "stray.weight": np.ones(1, np.float16),
    }
    message = faults_of(write(tmp_path, hf))
    for part in (
        "old.norm.weight -> norm.scale: shape (5,), want (3,)",
        "q.weight: dtype int8, want one of float16, bfloat16, float32",
        "are the same parameter",
        "in the checkpoint but not in the map: stray.weight",
        "missing from the checkpoint: v.weight",
    ):
        assert part in message


def test_names_and_shapes_are_checked_before_anything_is_put(tmp_path):
    hf = tensors()
    del hf["v.weight"]
    put = []
    faults_of(write(tmp_path, hf), put=put.append)
    assert not put


def test_nan_and_infinity_are_reported_for_every_tensor_that_holds_them(tmp_path):
    hf = tensors()
    hf["norm.weight"][1], hf["v.weight"][2, 2] = np.nan, -np.inf
    message = faults_of(write(tmp_path, hf))
    assert "norm.weight: holds NaN or infinity" in message
    assert "v.weight: holds NaN or infinity" in message
    assert "q.weight" not in message


def test_a_cast_that_overflows_is_refused(tmp_path):
    hf = tensors(np.float32) | {"norm.weight": np.full(3, 1e6, np.float32)}
    message = faults_of(write(tmp_path, hf), dtype="float16")
    assert "norm.weight: holds numbers too large for float16" in message


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(TensorFileError):
        load(tmp_path)


def test_the_host_holds_one_parameter_beside_the_finished_ones(tmp_path):
    # The worst spread: no layer is complete before the last shard is open.
    layers, shape = 24, (64, 128)
    entries = [
        Entry({f"{i}.{part}": shape for part in "abc"}, f"{i}.kernel", "transposed")
        for i in range(layers)
    ]
    ones = np.ones(shape, np.float32)
    write(tmp_path, *({f"{i}.{part}": ones for i in range(layers)} for part in "abc"))
    load(tmp_path, entries)  # warm: imports and caches are not what is measured
    tracemalloc.start()
    try:
        # The arrays stay on the host, as on a CPU device, so that the weights count too.
        weights = load(tmp_path, entries, put=lambda array: array)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    weights_bytes = sum(weight.nbytes for weight in weights.values())
    shard_bytes = weights_bytes // 3
    assert peak_bytes - weights_bytes < shard_bytes


def test_the_bar_is_shown_on_stderr_or_not_at_all(tmp_path, capsys):
    write(tmp_path, tensors())
    load(tmp_path, progress=False)
    assert capsys.readouterr() == ("", "")
    load(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "loading weights" in err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b'{"model_type": ', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1, 2]", "holds a list, want a JSON object"),
    ],
    ids=["missing", "cut_short", "not_text", "not_an_object"],
)
def test_a_config_that_cannot_be_read_says_why(tmp_path, content, why):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        read_config(tmp_path)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_config(tmp_path / "nowhere")
