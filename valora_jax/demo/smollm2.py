"""SmolLM2-135M-Instruct out of its GGUF file: Hugging Face Llama tensors, tokenizer, template.

The file is quantised (4 bit linears with a scale and an offset per 32 values, 8 bit embeddings);
the tensors given here are its exact values in float32.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
EMBEDDING = "embed_tokens.weight"
_TOP = {"token_embd.weight": EMBEDDING, "output_norm.weight": "norm.weight"}
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
_CONTENT = "message['content']"
# A content list becomes its pictures, a line each, and then its texts: LLaVA's order.
_RENDER_CONTENT = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endmacro -%}"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dims:
    """What the file's own metadata says of the model."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    max_tokens: int
    rope_theta: float
    rms_norm_eps: float
    bos: int
    eos: int
    pad: int


def unpermute(weight_EI: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of a query or key projection [E, I].

    It interleaves the two halves of each head that rotary positions turn together; Hugging Face
    keeps them one after the other.
    """
    rows, columns = weight_EI.shape
    pairs = weight_EI.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


class SmolLM2:
    """An open GGUF file. Tensors are read and dequantised one at a time."""

    def __init__(self, path: Path):
        self._reader = GGUFReader(path)
        self.dims = self._dims()

    def _field(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    def _dims(self) -> Dims:
        return Dims(
            width=self._field("llama.embedding_length"),
            mlp_width=self._field("llama.feed_forward_length"),
            layers=self._field("llama.block_count"),
            heads=self._field("llama.attention.head_count"),
            kv_heads=self._field("llama.attention.head_count_kv"),
            vocabulary=self._field("llama.vocab_size"),
            max_tokens=self._field("llama.context_length"),
            rope_theta=self._field("llama.rope.freq_base"),
            # Stored as float32, of which the shortest decimal is the number meant.
            rms_norm_eps=float(
                str(np.float32(self._field("llama.attention.layer_norm_rms_epsilon")))
            ),
            bos=self._field("tokenizer.ggml.bos_token_id"),
            eos=self._field("tokenizer.ggml.eos_token_id"),
            pad=self._field("tokenizer.ggml.padding_token_id"),
        )

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, float32 array); names are `LlamaModel`'s. The head is tied: not there."""
        heads = {"attn_q": self.dims.heads, "attn_k": self.dims.kv_heads}
        for tensor in self._reader.tensors:
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            if tensor.name in _TOP:
                yield _TOP[tensor.name], array
                continue
            _, layer, part, _ = tensor.name.split(".")
            if part in heads:
                array = unpermute(array, heads[part])
            yield f"layers.{layer}.{_PARTS[part]}.weight", array

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE tokenizer, rebuilt from the file's vocabulary and merges."""
        tokens, kinds, merges = (
            self._field(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")
        )
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind == _CONTROL_TOKEN
            ]
        )
        return tokenizer

    def chat_template(self) -> str:
        """The file's ChatML template, with pictures in a message's content."""
        return with_images(self._field("tokenizer.chat_template"))


def with_images(template: str) -> str:
    """Extends a text-only Jinja chat template: content may be a list with pictures.

    Raises:
      ValueError: the template does not print `message['content']` the way SmolLM2's does.
    """
    if template.count(_CONTENT) != 1:
        raise ValueError(f"want {_CONTENT} once in the chat template, got:\n{template}")
    return _RENDER_CONTENT + template.replace(_CONTENT, f"render({_CONTENT})")
