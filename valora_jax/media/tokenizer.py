"""Text <-> token ids, as a checkpoint's `tokenizer.json` says; chat template and stop tokens.

`tokenizer.json` counts as it is. The one thing that overrides it is an explicit `"legacy": false`
in the tokenizer_config.json of a Llama tokenizer: then the text after a special token does not get
a leading space of its own, as Hugging Face does too.
"""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from valora_jax.media.folder import read_json

_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")


class Tokenizer:
    """A checkpoint's tokenizer; safe to share between threads.

    Attributes:
      special_tokens: text of bos_token, eos_token … as tokenizer_config.json names them; the
        variables of a chat template.
      chat_template: Jinja source, or None.
      stop_token_ids: ids that end an answer, in ascending order.
      vocab_size: number of tokens; a model may have more (padded) rows.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str],
        chat_template: str | None = None,
        stop_token_ids: Iterable[int] | None = None,
    ):
        """Wraps a `tokenizers.Tokenizer`; without `stop_token_ids`, the end token stops."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        eos = self.eos_token_id
        if stop_token_ids is None:
            stop_token_ids = () if eos is None else (eos,)
        self.stop_token_ids = tuple(sorted(set(stop_token_ids)))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads tokenizer.json and, where they are, the configs and the chat template beside it.

        Raises:
          ValueError: tokenizer.json is missing or damaged, or a config is.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no tokenizer.json; copy it from the checkpoint")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"cannot read {file}: {error}") from error
        config = _read_if_there(folder / "tokenizer_config.json")
        if config.get("tokenizer_class") in _LLAMA_CLASSES and config.get("legacy") is False:
            backend.normalizer = None  # pyright: ignore[reportAttributeAccessIssue]
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                replacement="\u2581", prepend_scheme="first", split=False
            )
        return cls(
            backend,
            special_tokens={name: _content(config[name]) for name in _SPECIAL if config.get(name)},
            chat_template=_chat_template(folder, config),
            stop_token_ids=_stop_token_ids(folder),
        )

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of a text; special tokens written in it are read as such.

        Args:
          text: without lone surrogates, which UTF-8 cannot hold.
          add_special_tokens: what tokenizer.json adds around a text, such as `<s>`.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise ValueError(f"not a text of valid Unicode: {text[:80]!r}") from error

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of ids; those without a token (a model's padded rows) have none."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, text: str) -> int | None:
        """Returns the id of one token by its exact text in the vocabulary, or None."""
        return self._backend.token_to_id(text)

    def token_text(self, token_id: int) -> str | None:
        """Returns a token as the vocabulary writes it ("\u2581the", "<0x0A>"), or None."""
        return self._backend.id_to_token(token_id)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(id_ for id_, token in added.items() if token.special)

    @functools.cached_property
    def decoder_config(self) -> dict[str, Any]:
        """The `decoder` part of tokenizer.json; empty where it has none."""
        decoder = self._backend.decoder
        return {} if decoder is None else json.loads(decoder.__getstate__())

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: str | dict[str, Any]) -> str:
    """The text of a special token, which configs write as a string or as an AddedToken's fields."""
    return token if isinstance(token, str) else token["content"]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The newest of the three places wins; of several named templates, "default" counts."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text("utf-8")
    own = _read_if_there(folder / "chat_template.json").get("chat_template")
    template = own or config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        return by_name.get("default")
    return template


def _stop_token_ids(folder: Path) -> list[int] | None:
    """generation_config.json's end tokens, else config.json's, else None."""
    config = _read_if_there(folder / "config.json")
    places = (
        _read_if_there(folder / "generation_config.json"),
        config,
        config.get("text_config") or {},
    )
    for place in places:
        eos = place.get("eos_token_id")
        if eos is not None:
            return [eos] if isinstance(eos, int) else list(eos)
    return None
