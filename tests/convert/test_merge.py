"""A merged checkpoint holds W + scale * B @ A, rounded once, in a folder like the base's."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.tiny_models import (
    CHECKPOINTS,
    GOLDENS,
    same_bits,
    side_bytes,
    tensors_of,
    tied,
)
from valora_jax.convert import hf_to_orbax, merge_adapter, read_combination
from valora_jax.errors import TensorFileError
from valora_jax.lora.adapter import Adapter, Linear, LoraPair
from valora_jax.models import read_spec
from valora_jax.models.llava15.names import canonical
from valora_jax.models.loading import load_weights, read_config

BASE = CHECKPOINTS / "llava15-tiny"
HEAD = "language_model.lm_head.weight"
PROJECTOR = "multi_modal_projector.linear_1"


def read(name, weight=1.0, *, base=BASE):
    return read_combination(base, [(name, GOLDENS / "adapters" / name, weight)])


def merged(adapter, tmp_path, *, base=BASE, **options):
    merge_adapter(base, adapter, tmp_path / "merged", **options)
    return tensors_of(tmp_path / "merged")


def exact(adapter, base=BASE):
    """Every tensor that low-rank pairs change, in float64."""
    instances = read_spec(read_config(base)).adapter_target.instances()
    weights = {canonical(name): (name, array) for name, array in tensors_of(base).items()}
    out = {}
    for module, (site, layer) in instances.items():
        if (pair := adapter.pairs.get(site.name, {}).get(layer)) is not None:
            name, weight_NK = weights[f"{module}.weight"]
            a_RK, b_RN = pair.a_RK.astype(np.float64), pair.b_RN.astype(np.float64)
            out[name] = weight_NK.astype(np.float64) + pair.scale * (b_RN.T @ a_RK)
    return out


@pytest.mark.parametrize(
    "name", ["a04_all_linear_r4", "a07_patterns", "a08_rslora_r16", "a20_oldkeys", "a21_binfile"]
)
def test_float32_output_is_the_exact_sum_to_float32_precision(tmp_path, name):
    adapter = read(name)
    got, want = merged(adapter, tmp_path, dtype="float32"), exact(adapter)
    base = tensors_of(BASE)
    assert got.keys() == base.keys()
    for tensor, array in got.items():
        assert array.dtype == np.float32
        if tensor in want:
            np.testing.assert_allclose(array, want[tensor], rtol=0, atol=1e-7)
        else:
            np.testing.assert_array_equal(array, base[tensor].astype(np.float32))


def test_the_stored_dtype_is_kept_with_one_rounding_and_the_rest_bit_for_bit(tmp_path):
    adapter = read("a01_attn_lm_r8")
    got, want, base = merged(adapter, tmp_path), exact(adapter), tensors_of(BASE)
    assert want.keys() < base.keys()
    untouched = base.keys() - want.keys()
    assert same_bits({n: got[n] for n in untouched}, {n: base[n] for n in untouched})
    for name, exact_NK in want.items():
        assert got[name].dtype == np.float16
        # Half a step of float16, and what float32 arithmetic may move a number near a tie.
        step_NK = np.spacing(np.abs(got[name])).astype(np.float64)
        assert (np.abs(got[name] - exact_NK) <= 0.5 * step_NK + 1e-7).all()
    assert side_bytes(tmp_path / "merged") == side_bytes(BASE)


def test_a_saved_head_is_taken_over(tmp_path):
    adapter = read("a09_lm_head_saved")
    got = merged(adapter, tmp_path, dtype="float32")
    np.testing.assert_array_equal(got[HEAD], adapter.replaced_head_VD.astype(np.float32))


def test_a_head_copy_stands_in_for_the_base_as_in_peft(tmp_path):
    adapter = read("a17_lm_head_lora")
    (pair,) = adapter.pairs["head"].values()
    want = adapter.base_head_copy_VD.astype(np.float64) + pair.scale * (
        pair.b_RN.astype(np.float64).T @ pair.a_RK.astype(np.float64)
    )
    got = merged(adapter, tmp_path, dtype="float32")
    np.testing.assert_allclose(got[HEAD], want, rtol=0, atol=1e-7)


def test_replaced_linears_and_biases_are_taken_over(tmp_path):
    weight_NK, bias_N = np.full((128, 64), 0.3, np.float32), np.full(128, 0.1, np.float32)
    linear = Linear(weight_NK=weight_NK, bias_N=bias_N)
    pair = LoraPair(a_RK=np.ones((1, 64), np.float32), b_RN=np.ones((1, 128), np.float32), scale=2)
    adapter = Adapter(
        name="x",
        source="",
        pairs={"projector.up": {0: pair}},
        replaced_linears={"projector.up": {0: linear}},
    )
    got = merged(adapter, tmp_path, dtype="float32")
    np.testing.assert_array_equal(got[f"{PROJECTOR}.weight"], weight_NK + np.float32(2))
    np.testing.assert_array_equal(got[f"{PROJECTOR}.bias"], bias_N)


def test_a_weighted_sum_is_merged_in_one_step(tmp_path):
    names = {"a01_attn_lm_r8": 0.7, "a19_attn_lm_r8_b": -0.6}
    parts = [(name, GOLDENS / "adapters" / name, weight) for name, weight in names.items()]
    got = merged(read_combination(BASE, parts), tmp_path, dtype="float32")
    alone = [exact(read(name, weight)) for name, weight in names.items()]
    base = tensors_of(BASE)
    for name in alone[0]:
        want = sum(part[name] for part in alone) - base[name].astype(np.float64)
        np.testing.assert_allclose(got[name], want, rtol=0, atol=2e-7)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_changed_tied_head_becomes_its_own_tensor(tmp_path, weight):
    base = tied(tmp_path / "tied")
    adapter = read("a17_lm_head_lora", base=base)
    (pair,) = adapter.pairs["head"].values()
    adapter = dataclasses.replace(
        adapter,
        base_head_copy_VD=None,
        pairs={"head": {0: dataclasses.replace(pair, scale=weight * pair.scale)}},
    )
    got = merged(adapter, tmp_path, base=base)
    embedding = tensors_of(base)["language_model.model.embed_tokens.weight"]
    delta_VD = weight * pair.scale * (np.float32(pair.b_RN).T @ np.float32(pair.a_RK))
    want = (embedding.astype(np.float32) + delta_VD).astype(np.float16)
    np.testing.assert_allclose(got[HEAD], want, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(got["language_model.model.embed_tokens.weight"], embedding)
    config = read_config(tmp_path / "merged")
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False
    spec = read_spec(config)
    weights = load_weights(
        tmp_path / "merged",
        spec.entries,
        canonical=spec.canonical_name,
        ignored=spec.ignored_names,
        dtype=None,
        progress=False,
    )
    np.testing.assert_array_equal(weights["decoder.head.kernel"], got[HEAD].T)


def test_an_untouched_tied_head_stays_tied(tmp_path):
    base = tied(tmp_path / "tied")
    got = merged(read("a01_attn_lm_r8", base=base), tmp_path, base=base)
    assert HEAD not in got
    assert read_config(tmp_path / "merged") == read_config(base)


def test_the_config_names_the_new_dtype(tmp_path):
    got = merged(read("a01_attn_lm_r8"), tmp_path, dtype="bfloat16")
    assert {array.dtype for array in got.values()} == {np.dtype(ml_dtypes.bfloat16)}
    config = read_config(tmp_path / "merged")
    before = json.loads((BASE / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert {s["dtype"] for s in config.values() if isinstance(s, dict) and "dtype" in s} <= {
        "bfloat16"
    }
    assert config.keys() == before.keys()


def test_a_task_head_has_no_place(tmp_path):
    with pytest.raises(ValueError, match="the task head 'score', for which a checkpoint"):
        merged(read("a10_new_head"), tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_bias_for_a_linear_without_one_is_refused(tmp_path):
    pair = LoraPair(
        a_RK=np.ones((1, 128), np.float32),
        b_RN=np.ones((1, 128), np.float32),
        scale=1.0,
        bias_N=np.ones(128, np.float32),
    )
    adapter = Adapter(name="x", source="", pairs={"decoder.q": {0: pair}})
    with pytest.raises(ValueError, match=r"does not have: .*layers\.0\.self_attn\.q_proj\.bias"):
        merged(adapter, tmp_path)


def test_numbers_too_large_for_the_dtype_are_named(tmp_path):
    pair = LoraPair(
        a_RK=np.full((1, 128), 1e3, np.float32), b_RN=np.full((1, 128), 1e3, np.float32), scale=1.0
    )
    adapter = Adapter(name="x", source="", pairs={"decoder.q": {0: pair}})
    with pytest.raises(ValueError, match=r"q_proj\.weight: .* too large for float16; try float32"):
        merged(adapter, tmp_path)


def test_an_orbax_base_is_named_with_the_way_out(tmp_path):
    hf_to_orbax(BASE, tmp_path / "orbax", overwrite=False, progress=False)
    with pytest.raises(TensorFileError, match="orbax-to-hf"):
        merged(read("a01_attn_lm_r8"), tmp_path, base=tmp_path / "orbax")
