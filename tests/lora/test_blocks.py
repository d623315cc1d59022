import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.lora.llava_tiny import GOLDENS, TARGET
from valora_jax.lora.adapter import Adapter, LoraPair, LoraSite
from valora_jax.lora.blocks import pages_needed, pool_blocks
from valora_jax.lora.read import read_adapter
from valora_jax.lora.residency import REPLACED_HEADS

SITE = LoraSite(name="decoder.q", module="layers.{i}.q", layers=3, in_width=4, out_width=5)
OTHER = dataclasses.replace(SITE, name="decoder.v")
FLOAT32 = np.dtype(np.float32)


def pair(rank: int, *, bias: bool = False) -> LoraPair:
    rng = np.random.default_rng(rank)
    return LoraPair(
        a_RK=rng.standard_normal((rank, 4), np.float32),
        b_RN=rng.standard_normal((rank, 5), np.float32),
        scale=float(rank),
        bias_N=np.ones(5, np.float32) if bias else None,
    )


def adapter_of(**pairs_of_site) -> Adapter:
    pairs = {f"decoder.{site}": pairs for site, pairs in pairs_of_site.items()}
    return Adapter(name="a", source="a test", pairs=pairs)


def blocks_of(adapter: Adapter, *, biased=(), dtype=FLOAT32):
    return pool_blocks(adapter, [SITE, OTHER], biased_sites=biased, dtype=dtype)


def test_needs_count_the_largest_rank_of_any_layer_and_replaced_heads():
    adapter = adapter_of(q={0: pair(4), 2: pair(17)})
    assert pages_needed(adapter) == {"decoder.q": 2}
    adapter = dataclasses.replace(adapter, replaced_head_VD=np.zeros((7, 4)))
    assert pages_needed(adapter) == {"decoder.q": 2, REPLACED_HEADS: 1}


def test_ranks_of_a_layer_go_on_on_the_next_page_and_the_rest_is_zeros():
    small, large = pair(4), pair(17)
    blocks = blocks_of(adapter_of(q={0: small, 2: large}))
    first, second = blocks.pages["decoder.q"]
    np.testing.assert_array_equal(first.a_LrD[0, :4], small.a_RK)
    np.testing.assert_array_equal(first.b_LrE[2], large.b_RN[:16])
    np.testing.assert_array_equal(second.a_LrD[2, :1], large.a_RK[16:])
    assert not first.a_LrD[0, 4:].any()
    assert not first.b_LrE[1].any()
    assert not second.b_LrE[:2].any()
    assert not second.b_LrE[2, 1:].any()


def test_only_touched_sites_have_pages_and_all_have_scales():
    blocks = blocks_of(adapter_of(q={0: pair(4), 2: pair(17)}))
    assert list(blocks.pages) == ["decoder.q"]
    assert blocks.scale_L["decoder.q"].tolist() == [4, 0, 17]
    assert blocks.scale_L["decoder.v"].tolist() == [0, 0, 0]
    assert blocks.bias_LE == {}


def test_where_biases_are_served_those_that_an_adapter_lacks_are_zeros():
    adapter = adapter_of(q={0: pair(4), 1: pair(4, bias=True)})
    blocks = blocks_of(adapter, biased=["decoder.q", "decoder.v"])
    assert blocks.bias_LE["decoder.q"].sum(axis=1).tolist() == [0, 5, 0]
    assert not blocks.bias_LE["decoder.v"].any()


def test_weights_are_rounded_once_to_the_type_of_the_pool():
    adapter = read_adapter(GOLDENS / "a01_attn_lm_r8", name="a", target=TARGET)
    dtype = np.dtype(jnp.bfloat16)
    blocks = pool_blocks(adapter, TARGET.sites, biased_sites=(), dtype=dtype)
    (page,) = blocks.pages["decoder.o"]
    for layer, lora in adapter.pairs["decoder.o"].items():
        np.testing.assert_array_equal(page.a_LrD[layer, :8], lora.a_RK.astype(dtype))
