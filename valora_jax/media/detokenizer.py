"""Token ids -> text while they are still coming: what is returned never changes any more.

The pieces returned for a request, joined, equal `Tokenizer.decode` of all its ids. A character cut
in two by a token boundary waits for its rest. With byte-fallback tokens (`<0xE4>`, Llama's) a run
of them waits for its end, because one bad byte turns the whole run into replacement characters.
"""

import codecs
from typing import Any, Protocol

from valora_jax.media.tokenizer import Tokenizer


class _Text(Protocol):
    """Text of the visible tokens of one request."""

    def add(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """Detokenizes one request, in constant time a token; not for several threads at once."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        """Raises NotImplementedError for a decoder that is neither byte-level nor Llama's kind."""
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._text: _Text = _new_text(tokenizer)

    def add(self, token_id: int) -> str:
        """Takes the next id and returns the text that has become final, often ""."""
        if token_id in self._hidden or self._tokenizer.token_text(token_id) is None:
            return ""
        return self._text.add(token_id)

    def finish(self) -> str:
        """Returns what was held back, with replacement characters for what is incomplete."""
        return self._text.finish()


def _new_text(tokenizer: Tokenizer) -> _Text:
    """Chooses by the decoder, whose pieces must each depend on their neighbours only."""
    steps = _steps(tokenizer.decoder_config)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevelText(tokenizer)
    strips = [step for step in steps if step.get("type") == "Strip"]
    local = set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Fuse" in kinds
    if local and all(s["start"] <= 1 and s["stop"] == 0 for s in strips):
        return _ByteFallbackText(tokenizer)
    raise NotImplementedError(
        f"streaming text is not supported for the decoder {kinds}; "
        "supported are ByteLevel, and Replace + ByteFallback + Fuse + Strip"
    )


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


class _ByteLevelText:
    """Tokens are bytes, written as one printable character each; the text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        token = self._tokenizer.token_text(token_id) or ""
        try:
            data = bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token, written as plain text
            data = token.encode()
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's code: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


class _ByteFallbackText:
    """Tokens are text, those for single bytes apart; the first space of all is stripped.

    The last final token stays as the anchor of a window: decoded again in front of the new tokens,
    it takes the stripping upon itself, and what follows it is the new text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._anchor: list[int] = []
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        self._pending.append(token_id)
        if _is_byte(self._tokenizer.token_text(token_id) or ""):
            return ""
        return self.finish()

    def finish(self) -> str:
        if not self._pending:
            return ""
        before = self._decode(self._anchor)
        text = self._decode(self._anchor + self._pending)[len(before) :]
        self._anchor, self._pending = self._pending[-1:], []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
