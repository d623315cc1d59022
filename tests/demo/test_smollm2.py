import jinja2
import numpy as np
import pytest

from valora_jax.demo import smollm2

RNG = np.random.default_rng(2)


def interleaved(weight_EI, heads):
    """What llama.cpp does to a query projection: row 2 j + half of a head is row half, j."""
    rows = weight_EI.shape[0] // heads
    order = [h * rows + half * rows // 2 + j
             for h in range(heads) for j in range(rows // 2) for half in range(2)]  # fmt: skip
    return weight_EI[order]


@pytest.mark.parametrize("heads", [1, 3])
def test_unpermute_puts_the_halves_of_each_head_after_one_another(heads):
    weight_EI = RNG.standard_normal((heads * 8, 5))
    np.testing.assert_array_equal(
        smollm2.unpermute(interleaved(weight_EI, heads), heads), weight_EI
    )


def test_unpermute_of_one_small_head_by_hand():
    rows_EI = np.array([[0], [2], [1], [3]])
    np.testing.assert_array_equal(smollm2.unpermute(rows_EI, 1), [[0], [1], [2], [3]])


def test_every_tensor_gets_its_hugging_face_name(tiny):
    weights, model = tiny
    got = dict(model.tensors())
    assert len(got) == len(weights)
    np.testing.assert_array_equal(got[smollm2.EMBEDDING], weights["token_embd"])
    np.testing.assert_array_equal(got["layers.0.mlp.up_proj.weight"], weights["blk.0.ffn_up"])
    q_EI = interleaved(got["layers.0.self_attn.q_proj.weight"], 4)
    np.testing.assert_array_equal(q_EI, weights["blk.0.attn_q"])
    k_EI = interleaved(got["layers.0.self_attn.k_proj.weight"], 2)
    np.testing.assert_array_equal(k_EI, weights["blk.0.attn_k"])


def test_dims_come_from_the_file(tiny):
    dims = tiny[1].dims
    assert (dims.width, dims.heads, dims.kv_heads, dims.vocabulary) == (64, 4, 2, 9)
    assert dims.rms_norm_eps == 1e-5  # not 9.999999747378752e-06
    assert (dims.bos, dims.eos, dims.pad) == (1, 2, 0)


def test_the_tokenizer_merges_and_keeps_control_tokens_whole(tiny):
    tokenizer = tiny[1].tokenizer()
    ids = tokenizer.encode("<|im_start|>ab ab1<|im_end|>").ids
    assert ids == [1, 7, 8, 6, 2]
    assert tokenizer.decode(ids) == "ab ab1"


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("hello", "<user>hello"),
        ([{"type": "text", "text": "hello"}], "<user>hello"),
        ([{"type": "text", "text": "which?"}, {"type": "image"}, {"type": "image"}],
         "<user><image>\n<image>\nwhich?"),
    ],
)  # fmt: skip
def test_the_chat_template_takes_text_or_a_list_with_pictures(tiny, content, want):
    template = jinja2.Template(tiny[1].chat_template())
    assert template.render(messages=[{"role": "user", "content": content}]) == want


def test_a_template_that_cannot_be_extended_is_refused():
    with pytest.raises(ValueError, match="once in the chat template"):
        smollm2.with_images("{{ messages[0].content }}")
