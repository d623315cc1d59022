import itertools
import pathlib
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from valora_jax.media import IncrementalDetokenizer, Tokenizer

CHECKPOINT = pathlib.Path(__file__).parent.parent / "goldens" / "checkpoints" / "llava15-tiny"
LLAMA = Tokenizer.from_folder(CHECKPOINT)
REPLACEMENT = "\ufffd"


def byte_level_tokenizer() -> Tokenizer:
    """One token a byte, some words, and added tokens that byte-level code cannot spell."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "\u0120the", "\u0120", "ab"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens(["two words", "\u4e2d"])
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, special_tokens={"eos_token": "<|end|>"})


BYTE_LEVEL = byte_level_tokenizer()


def pieces(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of any kind, ids without a token included, and bytes that often make characters."""
    encoded = st.text(max_size=4).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    one = st.integers(0, tokenizer.vocab_size + 5).map(lambda token: [token])
    cut = st.tuples(encoded, st.integers(0, 3)).map(lambda pair: pair[0][: -pair[1] or None])
    return st.lists(st.one_of(one, encoded, cut), max_size=12).map(
        lambda parts: [*itertools.chain(*parts)]
    )


@pytest.mark.parametrize("tokenizer", [LLAMA, BYTE_LEVEL], ids=["llama", "byte_level"])
@settings(max_examples=400)
@given(data=st.data(), skip=st.booleans())
def test_the_pieces_joined_are_the_whole_text(tokenizer, data, skip):
    ids = data.draw(ids_of(tokenizer))
    got = "".join(pieces(tokenizer, ids, skip=skip))
    assert got == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("tokenizer", [LLAMA, BYTE_LEVEL], ids=["llama", "byte_level"])
@given(text=st.text(max_size=20))
def test_no_piece_of_a_sound_text_holds_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text.replace(REPLACEMENT, ""), add_special_tokens=False)
    assert REPLACEMENT not in "".join(pieces(tokenizer, ids, skip=True))


def test_text_comes_with_its_token():
    ids = LLAMA.encode("Hello world", add_special_tokens=False)
    got = pieces(LLAMA, ids, skip=True)
    assert all(got[:-1])
    assert got[-1] == ""


def test_only_the_first_space_of_all_is_stripped():
    ids = [671, 2, 671, *LLAMA.encode("two", add_special_tokens=False)]
    assert "".join(pieces(LLAMA, ids, skip=True)) == "  two"
    assert pieces(LLAMA, ids, skip=True)[:3] == ["", "", " "]


def test_an_incomplete_character_is_flushed_at_the_end():
    for tokenizer in (LLAMA, BYTE_LEVEL):
        cut = tokenizer.encode("\U0001f642", add_special_tokens=False)[:-1]
        got = pieces(tokenizer, cut, skip=True)
        assert set(got[:-1]) == {""}
        assert set(got[-1]) == {REPLACEMENT}


@pytest.mark.parametrize("tokenizer", [LLAMA, BYTE_LEVEL], ids=["llama", "byte_level"])
def test_the_time_of_a_token_does_not_grow_with_the_text(tokenizer):
    ids = tokenizer.encode("a\u4e2d b" * 5000, add_special_tokens=False)
    start = time.perf_counter()
    pieces(tokenizer, ids, skip=True)
    assert time.perf_counter() - start < 5  # 0.3 s; decoding everything at each token takes minutes


def test_an_unknown_decoder_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(NotImplementedError, match="WordPiece"):
        IncrementalDetokenizer(Tokenizer(backend, special_tokens={}))
