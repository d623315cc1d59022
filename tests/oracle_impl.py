"""The reference kit's protocol over the engine's own step: paged cache, LoraBatch, buckets.

    python check_oracle.py run --impl tests.oracle_impl:Factory --model llava15-tiny

Everything runs in float32 in small steps, so that prompts are chunked and requests share steps.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from valora_jax.config import EngineConfig
from valora_jax.convert import merge_adapter
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.adapter import Adapter
from valora_jax.lora.combine import combine
from valora_jax.lora.read import read_adapter
from valora_jax.media.chat import render_chat
from valora_jax.media.clip_pixels import ClipPixels
from valora_jax.media.images import load_image
from valora_jax.media.prompts import TokensPrompt
from valora_jax.media.tokenizer import Tokenizer

CONFIG = EngineConfig(
    dtype="float32",
    max_requests=4,
    max_tokens_per_step=64,
    max_request_tokens=1024,
    page_tokens=16,
    image_slots=8,
    max_adapters=8,
    lora_pages=16,
    max_replaced_heads=1,
    warm_up=False,  # most models here answer few requests, each of few shapes
)

type Inputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Model:
    folder: Path
    engine: Engine
    adapters: dict[str, Adapter]


class Factory:
    """What the checker calls; see its docstring for the protocol."""

    def load(self, checkpoint_dir: str) -> Model:
        engine = Engine(checkpoint_dir, CONFIG, show_progress=False)
        return Model(folder=Path(checkpoint_dir), engine=engine, adapters={})

    def forward(
        self, model: Model, inputs: Inputs, adapters: Sequence[str | None] | None = None
    ) -> np.ndarray:
        rows = model.engine.prompt_logits(_prompts(model, inputs), adapter=adapters)
        mask_BT = inputs["attention_mask"] > 0
        logits_BTV = np.zeros((*mask_BT.shape, rows[0].shape[1]), np.float32)
        for b, logits_TV in enumerate(rows):
            logits_BTV[b, mask_BT[b]] = logits_TV
        return logits_BTV

    def generate(
        self,
        model: Model,
        inputs: Inputs,
        max_new_tokens: int,
        eos_token_id: Sequence[int] | None,
        pad_token_id: int,
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        params = SamplingParams(
            temperature=0,
            max_tokens=max_new_tokens,
            ignore_eos=True,
            stop_token_ids=eos_token_id or (),
        )
        outputs = model.engine.generate(_prompts(model, inputs), params, adapter=adapters)
        rows = [output.outputs[0].token_ids for output in outputs]
        tokens_BN = np.full((len(rows), max(map(len, rows))), pad_token_id)
        for b, row in enumerate(rows):
            tokens_BN[b, : len(row)] = row
        return tokens_BN

    def load_adapter(self, model: Model, name: str, adapter_dir: str) -> None:
        model.engine.load_adapter(name, adapter_dir)
        target = model.engine.parts.spec.adapter_target
        model.adapters[name] = read_adapter(adapter_dir, name=name, target=target)

    def unload_adapter(self, model: Model, name: str) -> None:
        model.engine.unload_adapter(name)

    def combine(
        self, model: Model, name: str, parts: Sequence[tuple[str, float]], kind: Any
    ) -> None:
        model.engine.combine_adapters(name, dict(parts), kind=kind)
        weighted = [(model.adapters[part], weight) for part, weight in parts]
        model.adapters[name] = combine(name, weighted, kind=kind)

    def merge(self, model: Model, name: str) -> Model:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "merged"
            # A checkpoint has no place for a task head; the golden is of the language model.
            adapter = dataclasses.replace(model.adapters[name], task_head=None)
            merge_adapter(model.folder, adapter, out, dtype="float32")
            return self.load(str(out))

    def class_logits(self, model: Model, inputs: Inputs, adapter: str) -> np.ndarray:
        outputs = model.engine.classify(_prompts(model, inputs), adapter=adapter)
        return np.array([output.logits for output in outputs])

    def image_features(self, model: Model, inputs: Inputs) -> np.ndarray:
        runner, scratch_slot = model.engine.parts.runner, CONFIG.image_slots
        features = []
        for pixels_3hw in inputs["pixel_values"]:
            runner.encode([(pixels_3hw, scratch_slot, -1)])
            features.append(runner.read_features(scratch_slot))
        return np.stack(features)

    def encode(self, checkpoint_dir: str, text: str) -> list[int]:
        return _tokenizer(checkpoint_dir).encode(text)

    def decode(self, checkpoint_dir: str, ids: Sequence[int], skip_special: bool) -> str:
        return _tokenizer(checkpoint_dir).decode(ids, skip_special_tokens=skip_special)

    def chat(self, checkpoint_dir: str, messages: Any, add_generation_prompt: bool) -> str:
        tokenizer = _tokenizer(checkpoint_dir)
        text, _ = render_chat(
            tokenizer.chat_template or "",
            messages,
            image_token="<image>",
            special_tokens=tokenizer.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def pixel_values(self, checkpoint_dir: str, image_path: str) -> np.ndarray:
        return ClipPixels.from_folder(Path(checkpoint_dir))(load_image(image_path))


@functools.cache
def _tokenizer(checkpoint_dir: str) -> Tokenizer:
    return Tokenizer.from_folder(Path(checkpoint_dir))


def _prompts(model: Model, inputs: Inputs) -> list[TokensPrompt]:
    """The rows without their padding, each with its own images; the last row gets what is left."""
    spec = model.engine.parts.spec
    pixels = inputs.get("pixel_values", np.zeros((0, *spec.pixel_shape), np.float32))
    prompts: list[TokensPrompt] = []
    for ids_T, mask_T in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids_T[mask_T > 0].tolist()
        images = ids.count(spec.image_token_id) // spec.tokens_per_image
        if len(prompts) == len(inputs["input_ids"]) - 1:
            images = len(pixels)
        prompts.append(
            {"prompt_token_ids": ids, "multi_modal_data": {"pixel_values": pixels[:images]}}
        )
        pixels = pixels[images:]
    return prompts
