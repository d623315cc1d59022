import dataclasses

import numpy as np

from tests.lora.llava_tiny import GOLDENS, TARGET
from valora_jax.lora.adapter import Adapter, Linear, LoraPair, TaskHead
from valora_jax.lora.read import read_adapter


def pair(rank: int, *, scale: float = 1.0, seed: int = 0) -> LoraPair:
    rng = np.random.default_rng(seed)
    a_RK = rng.standard_normal((rank, 6), np.float32)
    return LoraPair(a_RK=a_RK, b_RN=rng.standard_normal((rank, 4), np.float32), scale=scale)


def test_sites_know_their_modules_and_layers():
    q, head = TARGET.sites[0], TARGET.sites[-1]
    assert q.module_of(3) == "model.language_model.layers.3.self_attn.q_proj"
    assert q.layer_in("model.language_model.layers.99.self_attn.q_proj") == 99
    assert q.layer_in("model.language_model.layers.3.self_attn.k_proj") is None
    assert q.layer_in("model_language_model.layers.3.self_attn.q_proj") is None
    assert head.layer_in("lm_head") == 0
    assert len(TARGET.instances()) == 4 * 13 + 3


def test_what_is_bound_is_said_in_one_line():
    adapter = Adapter(
        name="x",
        source="test",
        pairs={
            "decoder.q": {0: pair(8), 1: pair(2)},
            "decoder.v": {0: pair(8), 1: pair(2)},
            "decoder.o": {1: pair(4), 3: pair(4)},
            "head": {0: pair(8)},
        },
        replaced_linears={"projector.linear_1": {0: Linear(weight_NK=np.zeros((4, 6)))}},
        replaced_head_VD=np.zeros((704, 128), np.float32),
        task_head=TaskHead(module="score", weight_CD=np.zeros((7, 128), np.float32)),
    )
    assert adapter.bound() == (
        "decoder q, v of 2 layers, rank 2 to 8; decoder o of layers 1, 3, rank 4; "
        "head of 1 layer, rank 8; projector linear_1 of 1 layer, replaced; "
        "replaced head of 704 rows; task head score of 7 classes"
    )
    assert adapter.rank_of("decoder.q") == 8
    assert adapter.rank_of("decoder.k") == 0
    assert adapter.needs_base


def test_size_counts_every_array():
    adapter = read_adapter(GOLDENS / "a10_new_head", name="x", target=TARGET)
    lora_bytes = 2 * 4 * (8 * 128 + 8 * 128) * 2  # q and v, 4 layers, A and B, bfloat16
    assert adapter.size_bytes == lora_bytes + (7 * 128 + 7) * 2


def test_the_fingerprint_follows_the_contents_and_not_the_name():
    base = Adapter(name="x", source="s", pairs={"decoder.q": {0: pair(2)}})
    same = Adapter(name="y", source="t", pairs={"decoder.q": {0: pair(2)}})
    others = [
        {"decoder.q": {0: pair(2, scale=2.0)}},
        {"decoder.q": {0: pair(2, seed=1)}},
        {"decoder.q": {1: pair(2)}},
        {"decoder.k": {0: pair(2)}},
        {"decoder.q": {0: dataclasses.replace(pair(2), bias_N=np.zeros(4, np.float32))}},
    ]
    prints = {Adapter(name="x", source="s", pairs=pairs).fingerprint() for pairs in others}
    assert same.fingerprint() == base.fingerprint()
    assert len(prints | {base.fingerprint()}) == len(others) + 1
