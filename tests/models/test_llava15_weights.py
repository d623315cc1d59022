import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from valora_jax.errors import CheckpointError, TensorFileError
from valora_jax.models.llava15 import names
from valora_jax.models.llava15.config import LLAVA_1_5_7B, LLAVA_1_5_13B, Llava15Config
from valora_jax.models.llava15.weights import entries, expected_shapes, parameter_count
from valora_jax.models.loading import load_weights, read_config
from valora_jax.models.weight_map import to_hf
from valora_jax.tensorfiles import open_checkpoint

CHECKPOINTS = pathlib.Path(__file__).parent.parent / "goldens" / "checkpoints"
LAYOUT_OF = {
    "llava15-tiny": "hub",
    "llava15-tiny-gqa": "saved",
    "llava15-13b-tiny": "in_memory_4",  # and in three shards, every layer spread over them
}


def table_of(folder):
    return entries(Llava15Config.from_hf(read_config(folder)))


def load(folder, **kwargs):
    kwargs = {"dtype": None, "progress": False} | kwargs
    return load_weights(
        folder, table_of(folder), canonical=names.canonical, ignored=names.IGNORED, **kwargs
    )


def stored(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def rewrite(folder, hf):
    """Replaces the weights of a copy by `hf`, in one file."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(hf, folder / "model.safetensors")


@pytest.fixture(params=LAYOUT_OF)
def copy(request, tmp_path):
    return pathlib.Path(shutil.copytree(CHECKPOINTS / request.param, tmp_path / request.param))


@pytest.mark.parametrize(
    ("config", "numbers"),
    [(LLAVA_1_5_7B, 7_063_427_072), (LLAVA_1_5_13B, 13_351_494_656)],
    ids=["7b", "13b"],
)
def test_the_published_sizes_have_their_published_number_of_parameters(config, numbers):
    assert parameter_count(config) == numbers


def test_kernels_are_input_by_output_and_fused():
    decoder = dataclasses.replace(LLAVA_1_5_7B.decoder, kv_heads=8)
    shapes = expected_shapes(dataclasses.replace(LLAVA_1_5_7B, decoder=decoder))
    assert shapes["vision.patch_embedding.kernel"] == (3 * 14 * 14, 1024)
    assert shapes["vision.position_embedding"] == (577, 1024)
    assert shapes["vision.layers.23.attention.qkv.bias"] == (3 * 1024,)
    assert shapes["projector.up.kernel"] == (1024, 4096)
    assert shapes["decoder.layers.31.attention.qkv.kernel"] == (4096, (32 + 2 * 8) * 128)
    assert shapes["decoder.layers.0.mlp.gate_up.kernel"] == (4096, 2 * 11008)
    assert shapes["decoder.embedding"] == (32064, 4096)
    assert shapes["decoder.head.kernel"] == (4096, 32064)


@pytest.mark.parametrize(("name", "layout"), LAYOUT_OF.items())
def test_a_checkpoint_round_trips_bit_for_bit(name, layout):
    folder = CHECKPOINTS / name
    want = stored(folder)
    assert names.layout_of(want) == layout
    weights = load(folder)
    got = {names.written(n, layout): array for n, array in to_hf(table_of(folder), weights)}
    assert got.keys() == want.keys()
    for tensor, array in want.items():
        assert (got[tensor].shape, got[tensor].dtype) == (array.shape, array.dtype)
        assert got[tensor].tobytes() == array.tobytes()


def test_every_layout_in_one_file_gives_the_same_weights(copy):
    want = load(copy)
    canonical = {names.canonical(name): array for name, array in stored(copy).items()}
    for layout in names.LAYOUTS:
        rewrite(copy, {names.written(name, layout): a for name, a in canonical.items()})
        got = load(copy)
        assert got.keys() == want.keys()
        for path, array in want.items():
            np.testing.assert_array_equal(got[path], array)


def test_fused_rows_stand_in_the_order_q_k_v():
    folder = CHECKPOINTS / "llava15-tiny-gqa"
    hf, attention = stored(folder), "language_model.model.layers.1.self_attn"
    qkv_DE = np.asarray(load(folder)["decoder.layers.1.attention.qkv.kernel"])
    q_DE, k_DE, v_DE = np.split(qkv_DE, [96, 128], axis=1)
    for part, name in ((q_DE, "q_proj"), (k_DE, "k_proj"), (v_DE, "v_proj")):
        np.testing.assert_array_equal(part, hf[f"{attention}.{name}.weight"].T)


def test_old_buffers_are_ignored(copy):
    extra = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    rewrite(copy, stored(copy) | extra)
    load(copy)


def tie(folder):
    config = read_config(folder)
    config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))


def test_a_tied_head_is_the_embedding_transposed_and_is_not_written_back(copy):
    tie(copy)
    hf = {name: a for name, a in stored(copy).items() if names.canonical(name) != "lm_head.weight"}
    rewrite(copy, hf)
    weights = load(copy)
    embedding_VD = np.asarray(weights["decoder.embedding"])
    np.testing.assert_array_equal(weights["decoder.head.kernel"], embedding_VD.T)
    written = dict(to_hf(table_of(copy), weights))
    assert written.keys() == {names.canonical(name) for name in hf}


def test_a_head_of_its_own_counts_even_if_the_config_says_tied(copy):
    want = load(copy)["decoder.head.kernel"]
    tie(copy)
    np.testing.assert_array_equal(load(copy)["decoder.head.kernel"], want)


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def first_matrix(hf):
    return next(name for name in sorted(hf) if hf[name].ndim == 2)


def cut_short(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size * 6 // 10])
    return shard.name


def drop_a_tensor(folder):
    hf = load_file(first_shard(folder))
    name = first_matrix(hf)
    save_file({n: a for n, a in hf.items() if n != name}, first_shard(folder))
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        del index["weight_map"][name]
        path.write_text(json.dumps(index))
    return f"missing from the checkpoint: {names.canonical(name)}"


def change_a_shape(folder):
    hf = load_file(first_shard(folder))
    name = first_matrix(hf)
    save_file(hf | {name: hf[name].reshape(2 * len(hf[name]), -1)}, first_shard(folder))
    return f"{name} -> decoder."


def remove_the_weights(folder):
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    return "none of model.safetensors"


def break_the_config(folder):
    (folder / "config.json").write_text('{ "model_type": ')
    return "config.json is not JSON"


def change_the_model_type(folder):
    config = read_config(folder) | {"model_type": "nosuchmodel"}
    (folder / "config.json").write_text(json.dumps(config))
    return "model_type='nosuchmodel'"


def add_a_nan(folder):
    hf = load_file(first_shard(folder))
    name = first_matrix(hf)
    hf[name][0, 0] = np.nan
    save_file(hf, first_shard(folder))
    return f"{name}: holds NaN or infinity"


def ask_for_another_layer(folder):
    config = read_config(folder)
    layers = config["text_config"]["num_hidden_layers"]
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    return f"missing from the checkpoint: model.language_model.layers.{layers}.mlp.up_proj.weight"


def remove_a_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    return shard.name


def point_the_index_at_the_wrong_shard(folder):
    path = next(folder.glob("*.index.json"))
    index = json.loads(path.read_text())
    name, *_ = sorted(index["weight_map"])
    others = set(index["weight_map"].values()) - {index["weight_map"][name]}
    index["weight_map"][name] = min(others)
    path.write_text(json.dumps(index))
    return name


WHOLE = [
    cut_short,
    drop_a_tensor,
    change_a_shape,
    remove_the_weights,
    break_the_config,
    change_the_model_type,
    add_a_nan,
    ask_for_another_layer,
]


def check_refusal(folder, mutate):
    load(folder)
    fault = mutate(folder)
    with pytest.raises((CheckpointError, TensorFileError)) as error:
        load(folder)
    assert fault in str(error.value)


@pytest.mark.parametrize("mutate", WHOLE, ids=lambda mutate: mutate.__name__)
def test_a_broken_checkpoint_is_refused_with_its_fault(copy, mutate):
    check_refusal(copy, mutate)


@pytest.mark.parametrize("mutate", [remove_a_shard, point_the_index_at_the_wrong_shard])
def test_shards_that_disagree_with_the_index_are_refused(tmp_path, mutate):
    folder = shutil.copytree(CHECKPOINTS / "llava15-13b-tiny", tmp_path / "copy")
    check_refusal(pathlib.Path(folder), mutate)
