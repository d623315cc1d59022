import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from tests.lora.llava_tiny import GOLDENS
from valora_jax.lora.adapter import Adapter
from valora_jax.lora.batch import LoraBatch
from valora_jax.lora.blocks import pages_needed
from valora_jax.lora.host_store import AdapterRef
from valora_jax.lora.pool import DevicePool, pool_bytes
from valora_jax.lora.read import read_adapter
from valora_jax.lora.residency import REPLACED_HEADS, Placement, Residency
from valora_jax.models import read_spec
from valora_jax.models.llava15.config import LLAVA_1_5_7B
from valora_jax.models.llava15.sites import adapter_target
from valora_jax.models.loading import read_config

TARGET = read_spec(read_config(GOLDENS.parent / "checkpoints" / "llava15-tiny")).adapter_target
BIASED = ("projector.up", "projector.down")
PAGES = {site.name: 9 for site in TARGET.sites} | {REPLACED_HEADS: 2}
# Products of 64 to 192 terms, summed in another order and in float64.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}

MIXED = ["a01_attn_lm_r8", "a05_vision_proj_r8", "a06_qv_r64", "a07_patterns", "a17_lm_head_lora"]
SERVED = [
    name
    for name, entry in json.loads((GOLDENS / "index.json").read_text()).items()
    if entry["expect"] == "ok" and (GOLDENS / name).is_dir()
]


def golden(name: str) -> Adapter:
    return read_adapter(GOLDENS / name, name=name, target=TARGET)


class Device:
    """A pool and who is in it."""

    def __init__(self, *, pages_of_site=PAGES, slots=8, dtype=jnp.float32):
        self.pool = DevicePool(
            TARGET, pages_of_site=pages_of_site, slots=slots, dtype=dtype, biased_sites=BIASED
        )
        self.residency = Residency(pages_of_site, slots=slots)

    def load(self, adapter: Adapter) -> Placement:
        ref = AdapterRef(name=adapter.name, version=1)
        placement = self.residency.place(ref, pages_needed(adapter))
        assert placement is not None
        self.pool.write(jax.device_put(self.pool.blocks(adapter)), placement)
        return placement

    def unload(self, adapter: Adapter) -> None:
        self.residency.drop(AdapterRef(name=adapter.name, version=1))

    def updates(self, x_of: dict[str, np.ndarray], adapter_T: list[int]) -> dict[str, jax.Array]:
        """Site -> what each row gets from its adapter, `[L, T, E]`, as a step computes it."""
        slot_T = np.array(adapter_T, np.int32)
        return _step(self.pool.pools, self.pool.biases_LSE, x_of, slot_T)


@jax.jit
def _step(pools, biases_LSE, x_of, adapter_T):
    lora = LoraBatch.of(adapter_T, pools=pools, biases_LSE=biases_LSE, implementation="xla")

    def update(site, layer: int):
        zeros_TE, x_TD = jnp.zeros((len(adapter_T), site.out_width)), x_of[site.name]
        return lora.add(zeros_TE, x_TD, sites=(site.name,), columns=(0,), layer=layer)

    return {s.name: jnp.stack([update(s, i) for i in range(s.layers)]) for s in TARGET.sites}


def inputs(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {s.name: rng.standard_normal((rows, s.in_width), np.float32) for s in TARGET.sites}


def expected(adapters: list[Adapter | None], x_of: dict[str, np.ndarray], site) -> np.ndarray:
    """`[L, T, E]` in float64, from the adapters' own arrays."""
    out_LTE = np.zeros((site.layers, len(adapters), site.out_width))
    for t, adapter in enumerate(adapters):
        for layer, pair in (adapter.pairs.get(site.name, {}) if adapter else {}).items():
            h_R = np.float64(pair.a_RK) @ np.float64(x_of[site.name][t])
            out_LTE[layer, t] = pair.scale * (h_R @ np.float64(pair.b_RN))
            if pair.bias_N is not None:
                out_LTE[layer, t] += pair.bias_N
    return out_LTE


def check_updates(device: Device, adapters: list[Adapter | None], slots: list[int]) -> None:
    x_of = inputs(len(adapters))
    got = device.updates(x_of, slots)
    for site in TARGET.sites:
        want_LTE = expected(adapters, x_of, site)
        np.testing.assert_allclose(got[site.name], want_LTE, **FLOAT32, err_msg=site.name)


def with_bias(adapter: Adapter, *sites: str) -> Adapter:
    pairs = {
        site: {i: dataclasses.replace(p, bias_N=np.ones(p.b_RN.shape[1])) for i, p in of.items()}
        for site, of in adapter.pairs.items()
        if site in sites
    }
    return dataclasses.replace(adapter, name="biased", pairs={**adapter.pairs, **pairs})


def pointers(pool: DevicePool) -> list[int]:
    return [a.unsafe_buffer_pointer() for a in jax.tree.leaves((pool.pools, pool.biases_LSE))]


def test_rows_of_one_batch_get_their_own_adapters_everywhere():
    device, adapters = Device(), [golden(name) for name in MIXED]
    slots = [device.load(adapter).slot for adapter in adapters]
    check_updates(device, [*adapters, None, adapters[0]], [*slots, -1, slots[0]])


def test_pages_are_reused_without_a_trace_of_their_last_owner():
    device, used = Device(slots=1), []
    for name in ["a06_qv_r64", "a02_attn_suffix_r4", "a18_layers_13", "a06_qv_r64", "a21_binfile"]:
        adapter = golden(name)
        placement = device.load(adapter)
        used.append(set(placement.pages.get("decoder.q", ())))
        check_updates(device, [adapter, None], [placement.slot, -1])
        device.unload(adapter)
    assert used[1] < used[0]
    assert used[4] < used[3]


def test_a_bias_is_added_to_its_rows_and_goes_with_its_adapter():
    device, plain = Device(slots=1), golden("a05_vision_proj_r8")
    for adapter in (with_bias(plain, *BIASED), plain, with_bias(plain, "projector.up")):
        slot = device.load(adapter).slot
        check_updates(device, [adapter, None], [slot, -1])
        device.unload(adapter)


def test_a_bias_where_none_is_served_is_refused():
    device, adapter = Device(), golden("a04_all_linear_r4")
    assert device.pool.refusals(with_bias(adapter, *BIASED)) == []
    assert device.pool.refusals(with_bias(adapter, "vision.up", "projector.up")) == [
        "vision.up: brings a bias, which is served in projector.up, projector.down"
    ]


def test_ten_uploads_after_warm_up_compile_nothing():
    device, adapters = Device(), [golden(name) for name in SERVED[:10]]
    device.pool.warm_up()
    jax.config.update("jax_no_tracing", True)
    try:
        for adapter in adapters:
            device.load(adapter)
            device.unload(adapter)
    finally:
        jax.config.update("jax_no_tracing", False)


def test_uploads_happen_in_place():
    device = Device()
    jax.block_until_ready(device.pool.pools)
    before = pointers(device.pool)
    device.load(with_bias(golden("a04_all_linear_r4"), *BIASED))
    assert pointers(device.pool) == before


def test_warm_up_leaves_zeros():
    pool = Device().pool
    pool.warm_up()
    assert not any(leaf.any() for leaf in jax.tree.leaves((pool.pools, pool.biases_LSE)))


def test_weights_are_rounded_once_to_the_type_of_the_pool():
    device, adapter = Device(dtype=jnp.bfloat16), golden("a01_attn_lm_r8")
    (page,) = device.load(adapter).pages["decoder.o"]
    pool = device.pool.pools["decoder.o"]
    for layer, pair in adapter.pairs["decoder.o"].items():
        start = (layer * PAGES["decoder.o"] + page) * 16
        np.testing.assert_array_equal(
            pool.b_RE[start : start + 16],
            np.pad(pair.b_RN, [(0, 8), (0, 0)]).astype(jnp.bfloat16),
        )


def test_only_the_given_sites_take_memory():
    pool = Device(pages_of_site={"decoder.q": 2, "decoder.v": 3}).pool
    assert list(pool.pools) == ["decoder.q", "decoder.v"]
    assert not pool.biases_LSE


def test_bytes_are_known_before_anything_is_allocated():
    kwargs = dict(pages_of_site=PAGES, slots=8, dtype=jnp.bfloat16, biased_sites=BIASED)
    pool = DevicePool(TARGET, **kwargs)
    arrays = jax.tree.leaves((pool.pools, pool.biases_LSE, pool._zeros_LrN))
    assert pool_bytes(TARGET, **kwargs) == sum(array.nbytes for array in arrays)

    full = adapter_target(LLAVA_1_5_7B)
    sites = [site.name for site in full.sites if site.name.startswith("decoder.")]
    kwargs = dict(slots=0, dtype=jnp.bfloat16, biased_sites=())
    one, two = (
        pool_bytes(full, pages_of_site=dict.fromkeys(sites, pages), **kwargs) for pages in (1, 2)
    )
    assert two - one == 79_953_920  # a page
    assert one - (two - one) == 15_466_496  # zeros, once for each width
