import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.lora.llava_tiny import GOLDENS, TARGET, canonical
from valora_jax.errors import AdapterError, TensorFileError
from valora_jax.lora.peft import read_peft
from valora_jax.lora.peft_config import PeftConfig
from valora_jax.tensorfiles import open_tensors

INDEX = json.loads((GOLDENS / "index.json").read_text())
BAD = json.loads((GOLDENS / "bad" / "index.json").read_text())
REFUSED = {
    "a11_dora_r8": "use_dora=True",
    "a12_lora_bias_r4": "lora_bias=True",
    "a13_bias_lora_only": "trained biases of the base",
    "a14_embed_lora_r4": "LoRA on an embedding",
    "x01_ia3": "peft_type 'IA3'",
}
SERVED = [name for name in INDEX if (GOLDENS / name).is_dir() and name not in REFUSED]
LM = "base_model.model.model.language_model.layers"


def read(name: str):
    return read_peft(GOLDENS / name, name=name, target=TARGET)


@pytest.fixture
def folder(tmp_path):
    """Writes a copy of the good control adapter with changes to its config and tensors."""
    config = json.loads((GOLDENS / "bad" / "b00_control_good" / "adapter_config.json").read_text())
    good = load_file(GOLDENS / "bad" / "b00_control_good" / "adapter_model.safetensors")

    def write(tensors=None, *, drop=(), **fields):
        fields = {k: v for k, v in (config | fields).items() if k not in drop}
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        save_file(good | (tensors or {}), tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize("name", SERVED)
def test_every_tensor_of_a_golden_is_bound_unchanged(name):
    adapter = read(name)
    [path] = (GOLDENS / name).glob("adapter_model.*")
    with open_tensors(path) as file:
        tensors = {canonical(n.removeprefix("base_model.model.")): file.read(n) for n in file.names}
    bound = 0
    for site in TARGET.sites:
        for layer, pair in adapter.pairs.get(site.name, {}).items():
            a = tensors[f"{site.module_of(layer)}.lora_A.weight"]
            b = tensors[f"{site.module_of(layer)}.lora_B.weight"]
            np.testing.assert_array_equal(pair.a_RK, a)
            np.testing.assert_array_equal(pair.b_RN, b.T)
            assert pair.b_RN.flags.c_contiguous
            assert pair.a_RK.dtype == a.dtype
            bound += 2
    others = [adapter.replaced_head_VD, adapter.base_head_copy_VD, adapter.task_head]
    heads = sum(item is not None for item in others) + ("new_head" in name)  # weight and bias
    assert bound + heads == len(tensors)


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_what_is_not_plain_lora_is_refused_by_name(name, message):
    with pytest.raises(NotImplementedError, match=message):
        read(name)


@pytest.mark.parametrize("name", BAD)
def test_every_bad_folder_is_refused_and_its_code_does_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if BAD[name]["expect"] == "ok":
        assert read_peft(GOLDENS / "bad" / name, name=name, target=TARGET).bound()
        return
    with pytest.raises((AdapterError, TensorFileError, NotImplementedError)) as error:
        read_peft(GOLDENS / "bad" / name, name=name, target=TARGET)
    assert name in str(error.value)
    assert not list(tmp_path.iterdir())


MESSAGES = {
    "b05_rank_mismatch": "rank 2, adapter_config.json says 8",
    "b08_missing_B": "lacks lora_B.weight",
    "b09_unknown_layer": r"layer 99 of decoder\.q does not exist, the model has 4",
    "b10_nan": "lora_A.weight: holds NaN or Inf",
    "b15_r_zero": "r is 0, want a positive whole number",
    "b18_alpha_nan": "lora_alpha is nan, want a finite number",
    "b25_transposed_A": r"shape \(128, 2\), want \(2, 128\) \(it is transposed\)",
    "b28_no_tensors": "the file holds no tensors",
    "b29_wrong_saved_head": r"lm_head\.weight: shape \(33, 24\), want \(704, 128\)",
    "b31_pickle_code": r"refers to posix\.mkdir",
    "b33_foreign_keys": "roberta.* binds to nothing in this model",
}


@pytest.mark.parametrize(("name", "message"), MESSAGES.items())
def test_the_message_has_the_fault_with_its_values(name, message):
    with pytest.raises(ValueError, match=message):
        read_peft(GOLDENS / "bad" / name, name=name, target=TARGET)


def test_scales_follow_the_patterns_and_rslora():
    patterned, rslora = read("a07_patterns").pairs, read("a08_rslora_r16").pairs
    assert patterned["decoder.q"][0].scale == 32 / 2
    assert patterned["decoder.q"][1].scale == 16 / 8
    assert patterned["decoder.o"][2].scale == 1 / 4
    assert patterned["decoder.gate"][3].scale == 5 / 8
    assert patterned["decoder.down"][1].scale == 16 / 12
    assert rslora["decoder.q"][0].scale == 8 / math.sqrt(16)


def test_old_key_names_and_torch_files_give_the_same_adapter():
    assert read("a20_oldkeys").fingerprint() == read("a18_layers_13").fingerprint()
    assert read("a21_binfile").fingerprint() == read("a12b_qv_r4").fingerprint()


def test_heads_are_told_apart():
    replaced, new, on_head = (
        read("a09_lm_head_saved"),
        read("a10_new_head"),
        read("a17_lm_head_lora"),
    )
    assert replaced.replaced_head_VD.shape == (704, 128)
    assert (new.task_head.module, new.task_head.weight_CD.shape) == ("score", (7, 128))
    assert new.task_head.bias_C.shape == (7,)
    assert on_head.base_head_copy_VD.shape == (704, 128)
    assert on_head.rank_of("head") == 8
    assert on_head.replaced_head_VD is None


paths = st.sampled_from(
    [
        f"model.language_model.layers.{i}.{m}"
        for i in (0, 1, 11)
        for m in ("mlp.up_proj", "x.o_proj")
    ]
)
keys = st.sampled_from(
    [
        "o_proj",
        "up_proj",
        "proj",
        r"layers\.1\..*",
        "layers.1.mlp.up_proj",
        r"(x|mlp)\.\w+",
        "^model.*",
    ]
)


@given(st.lists(st.tuples(keys, st.integers(1, 99)), max_size=4, unique_by=lambda i: i[0]), paths)
def test_the_first_pattern_that_matches_the_end_of_the_path_counts(items, path):
    config = PeftConfig(
        r=100,
        alpha=100.0,
        rank_pattern=dict(items),
        alpha_pattern={key: float(value) for key, value in items},
        use_rslora=False,
        modules_to_save=(),
        bias="none",
        base_model="",
    )
    # A key may start after any dot of the path; one with an anchor, at its beginning only.
    starts = [0, *(match.end() for match in re.finditer(r"\.", path))]
    fits = [
        v
        for key, v in items
        if any(re.fullmatch(key, path[s:]) for s in starts if not (s and key[0] == "^"))
    ]
    assert config.rank_of(path) == (fits[0] if fits else 100)
    assert config.scale_of(path) == 1.0


def test_every_fault_of_a_folder_is_listed_at_once(folder):
    path = folder(
        {
            f"{LM}.0.self_attn.q_proj.lora_A.weight": np.full((2, 128), np.nan, np.float32),
            f"{LM}.9.self_attn.q_proj.lora_A.weight": np.ones((2, 128), np.float32),
            f"{LM}.1.self_attn.v_proj.lora_B.weight": np.ones((128, 2), np.int32),
            f"{LM}.1.self_attn.q_proj.lora_A.weight": np.ones((2, 64), np.float32),
            "base_model.model.stranger.weight": np.ones((2, 128), np.float32),
            "no.prefix.lora_A.weight": np.ones((2, 128), np.float32),
        },
        modules_to_save=["lm_head"],
    )
    with pytest.raises(AdapterError) as error:
        read_peft(path, name="x", target=TARGET)
    for fault in (
        "0.self_attn.q_proj.lora_A.weight: holds NaN or Inf",
        "layer 9 of decoder.q does not exist",
        "v_proj.lora_B.weight: holds int32, want floating point",
        "lora_A.weight: shape (2, 64), want (2, 128)",
        "stranger: binds to nothing in this model",
        "no.prefix.lora_A.weight: not the key of",
        "modules_to_save names 'lm_head'",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(r="8"), "r is '8'"),
        (dict(r=True), "r is True"),
        (dict(lora_alpha=10**400), "lora_alpha is 1000"),
        (dict(lora_alpha=math.inf), "lora_alpha is inf"),
        (dict(rank_pattern=[1]), "rank_pattern is a list"),
        (dict(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\] is 0"),
        (dict(alpha_pattern={"q_proj": "x"}), r"alpha_pattern\['q_proj'\] is 'x'"),
        (dict(alpha_pattern={"(": 1}), "no regex"),
        (dict(use_rslora="yes"), "use_rslora is 'yes'"),
        (dict(modules_to_save="lm_head"), "modules_to_save is 'lm_head'"),
        (dict(drop=["lora_alpha"]), "lacks 'lora_alpha'"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(folder, fields, message):
    with pytest.raises(AdapterError, match=message):
        read_peft(folder(**fields), name="x", target=TARGET)


@pytest.mark.parametrize(
    "fields",
    [
        dict(alora_invocation_tokens=[1, 2]),
        dict(target_parameters=["experts.w"]),
        dict(layer_replication=[[0, 4]]),
        dict(use_qalora=True),
        dict(trainable_token_indices=[3]),
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="loftq"),
        dict(a_field_of_a_later_peft={"on": 1}),
    ],
    ids=str,
)
def test_a_feature_that_is_not_served_is_never_ignored(folder, fields):
    with pytest.raises(NotImplementedError, match=next(iter(fields))):
        read_peft(folder(**fields), name="x", target=TARGET)


def test_a_minimal_old_config_is_enough(folder):
    path = folder()
    fields = dict(peft_type="LORA", r=2, lora_alpha=4, enable_lora=None, merge_weights=False)
    (path / "adapter_config.json").write_text(json.dumps(fields))
    adapter = read_peft(path, name="x", target=TARGET)
    assert {pair.scale for pair in adapter.pairs["decoder.q"].values()} == {2.0}


def test_saved_linears_of_the_model_replace_them(folder):
    weight, bias = np.ones((128, 64), np.float16), np.ones(128, np.float16)
    stem = "base_model.model.model.multi_modal_projector.linear_1"
    path = folder(
        {f"{stem}.weight": weight, f"{stem}.bias": bias},
        modules_to_save=["multi_modal_projector.linear_1"],
    )
    linear = read_peft(path, name="x", target=TARGET).replaced_linears["projector.linear_1"][0]
    np.testing.assert_array_equal(linear.weight_NK, weight)
    np.testing.assert_array_equal(linear.bias_N, bias)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("model.language_model.norm.weight", (128,), "a replaced model.language_model.norm"),
        ("model.language_model.embed_tokens.weight", (704, 128), "a replaced .*embed_tokens"),
        ("norm.bias", (128,), "a trained bias"),
    ],
)
def test_other_saved_tensors_are_refused_as_not_served(folder, key, shape, message):
    path = folder(
        {f"base_model.model.{key}": np.ones(shape, np.float32)},
        modules_to_save=["embed_tokens", "norm"],
    )
    with pytest.raises(NotImplementedError, match=message):
        read_peft(path, name="x", target=TARGET)


def test_float64_is_rounded_and_out_of_range_is_refused(folder):
    key = f"{LM}.0.self_attn.q_proj.lora_A.weight"
    adapter = read_peft(folder({key: np.full((2, 128), 0.1)}), name="x", target=TARGET)
    assert adapter.pairs["decoder.q"][0].a_RK.dtype == np.float32
    with pytest.raises(AdapterError, match="holds NaN or Inf"):
        read_peft(folder({key: np.full((2, 128), 1e300)}), name="x", target=TARGET)


def test_bfloat16_stays_bfloat16():
    assert read("a03_all_linear_lm_r16").pairs["decoder.up"][0].a_RK.dtype == ml_dtypes.bfloat16
