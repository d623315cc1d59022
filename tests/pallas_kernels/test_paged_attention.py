"""Paged attention against a NumPy reference: chunks, decode rows, grouped heads, odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention as op
from pallas_kernels.paged_attention import reference

# Both sides accumulate in float32 or better; the order of the sums differs.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
LAYERS, W = 2, 8

# Each case: query heads, key-value heads, head width, page tokens, rows of (cached, new) tokens.
# One new token is a decode row, more are a chunk.
CASES = {
    "one_decode": (4, 4, 16, 16, [(20, 1)]),
    "decodes_of_many_lengths": (4, 2, 16, 16, [(0, 1), (63, 1), (64, 1), (100, 1)]),
    "one_prompt": (4, 4, 16, 16, [(0, 37)]),
    "prompt_longer_than_a_block": (2, 1, 8, 16, [(0, 100)]),
    "continued_chunk": (4, 2, 16, 16, [(50, 30)]),
    "prefix_hit_of_one_page": (4, 2, 16, 16, [(16, 5)]),
    "mixed_step": (6, 2, 16, 16, [(70, 1), (3, 1), (0, 20), (64, 9), (10, 66)]),
    "five_heads": (5, 5, 16, 16, [(9, 1), (0, 12)]),
    "pages_of_a_tile": (9, 3, 64, 64, [(130, 1), (100, 70)]),
    "pages_that_divide_no_tile": (2, 2, 8, 24, [(30, 1), (20, 40)]),
}


def build(case, *, spare_tokens=3):
    """A step: random past and new keys, written through `write_kv`; returns what to compare."""
    N, K, H, page_tokens, rows = case
    rng = np.random.default_rng(0)
    pages = len(rows) * W + 1
    table = 1 + rng.permutation(pages - 1).reshape(len(rows), W)
    T = sum(new for _, new in rows) + spare_tokens
    q_TNH = rng.standard_normal((T, N, H), np.float32)
    cache = np.full((LAYERS * pages, K, page_tokens, H), 7.0, np.float32)
    kv = op.KVPages(k_PKpH=jnp.asarray(cache), v_PKpH=jnp.asarray(cache))
    k_TKH, v_TKH = (rng.standard_normal((T, K, H), np.float32) for _ in range(2))
    page_T, offset_T = np.zeros(T, np.int32), np.zeros(T, np.int32)
    starts, wants, t = [], [], 0
    for b, (cached, new) in enumerate(rows):
        past = [rng.standard_normal((cached, K, H), np.float32) for _ in range(2)]
        where = np.arange(cached)
        kv = op.write_kv(
            kv,
            *past,
            page_T=jnp.asarray(table[b, where // page_tokens]),
            offset_T=jnp.asarray(where % page_tokens),
            layer_page=pages,
        )
        position = cached + np.arange(new)
        page_T[t : t + new] = table[b, position // page_tokens]
        offset_T[t : t + new] = position % page_tokens
        keys, values = (
            np.concatenate([p, x[t : t + new]]) for p, x in zip(past, (k_TKH, v_TKH), strict=True)
        )
        wants.append(reference.attend(q_TNH[t : t + new], keys, values))
        starts.append(t)
        t += new
    kv = op.write_kv(kv, k_TKH, v_TKH, page_T=page_T, offset_T=offset_T, layer_page=pages)
    return q_TNH, kv, table, starts, wants, pages


def lay_out(case, table, starts):
    rows = case[-1]
    decode = [b for b, (_, new) in enumerate(rows) if new == 1]
    chunk = [b for b, (_, new) in enumerate(rows) if new > 1]
    assert decode == list(range(len(decode))), "decode rows come first"
    pad = 2  # unused rows must change nothing
    kv_len = [sum(rows[b]) for b in decode] + [0] * pad
    decodes = op.Decodes(
        kv_len_D=jnp.asarray(kv_len, jnp.int32),
        page_DW=jnp.asarray(np.concatenate([table[decode], np.zeros((pad, W), int)])),
        count=jnp.int32(len(decode)),
    )
    columns = [(starts[b], rows[b][1], sum(rows[b])) for b in chunk] + [(0, 0, 0)] * pad
    start_C, len_C, kv_len_C = (jnp.asarray(x, jnp.int32) for x in zip(*columns, strict=True))
    chunks = op.Chunks(
        start_C=start_C,
        len_C=len_C,
        kv_len_C=kv_len_C,
        page_CW=jnp.asarray(np.concatenate([table[chunk], np.zeros((pad, W), int)])),
        count=jnp.int32(len(chunk)),
    )
    return decodes, chunks


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_token_attends_to_its_own_past(case):
    q_TNH, kv, table, starts, wants, pages = build(case)
    decodes, chunks = lay_out(case, table, starts)
    got_TNH = op.paged_attention(
        q_TNH, kv, decodes=decodes, chunks=chunks, layer_page=pages, implementation="xla"
    )
    for start, want_TNH in zip(starts, wants, strict=True):
        got = np.asarray(got_TNH)[start : start + len(want_TNH)]
        np.testing.assert_allclose(got, want_TNH, **FLOAT32)
    assert np.isfinite(got_TNH).all()


def test_a_step_of_decodes_alone():
    case = CASES["decodes_of_many_lengths"]
    q_TNH, kv, table, starts, wants, pages = build(case)
    decodes, _ = lay_out(case, table, starts)
    got_TNH = op.paged_attention(
        q_TNH, kv, decodes=decodes, chunks=None, layer_page=pages, implementation="xla"
    )
    np.testing.assert_allclose(got_TNH[: len(wants)], np.concatenate(wants), **FLOAT32)


def test_writing_touches_no_other_page():
    case = CASES["mixed_step"]
    _, kv, table, _, _, pages = build(case)
    assert (kv.k_PKpH[:pages] == 7.0).all(), "the other layer"
    unused = table[0, 6:] + pages  # request 0 has 71 tokens: five pages of 16
    assert (kv.k_PKpH[unused] == 7.0).all()


@pytest.mark.parametrize(
    ("q_shape", "message"),
    [((3, 5, 16), "5 heads of 16, the cache 2 heads of 16"), ((3, 4, 8), "4 heads of 8")],
)
def test_heads_that_do_not_fit_are_refused(q_shape, message):
    kv = op.KVPages(k_PKpH=jnp.zeros((4, 2, 16, 16)), v_PKpH=jnp.zeros((4, 2, 16, 16)))
    decodes = op.Decodes(
        kv_len_D=jnp.ones(1, jnp.int32), page_DW=jnp.zeros((1, 2), jnp.int32), count=jnp.int32(1)
    )
    with pytest.raises(ValueError, match=message):
        op.paged_attention(
            jnp.zeros(q_shape), kv, decodes=decodes, chunks=None, layer_page=0, implementation="xla"
        )


def test_the_cache_is_updated_in_place_under_jit():
    kv = op.KVPages(k_PKpH=jnp.zeros((4, 2, 16, 16)), v_PKpH=jnp.zeros((4, 2, 16, 16)))
    before = kv.k_PKpH.unsafe_buffer_pointer()

    def write(kv, x_TKH, where_T):
        return op.write_kv(kv, x_TKH, x_TKH, page_T=where_T, offset_T=where_T, layer_page=0)

    kv = jax.jit(write, donate_argnums=0)(kv, jnp.ones((2, 2, 16)), jnp.arange(2))
    assert kv.k_PKpH.unsafe_buffer_pointer() == before
