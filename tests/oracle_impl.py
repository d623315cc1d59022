"""The reference kit's protocol over the engine's own step: paged cache, LoraBatch, buckets.

    VALORA_ORACLE_MODE=mixture \
    python check_oracle.py run --impl tests.oracle_impl:Factory --model llava15-tiny

Everything runs in float32 in small steps, so that prompts are chunked and requests share steps. The
mode is "unmerged" unless the variable says "merged", in which a row's own adapter is in the weights
of all its steps, or "mixture", in which another one is. The engine's counters must say so, too.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.fixed_policy import decided, fold
from valora_jax.config import EngineConfig
from valora_jax.convert import merge_adapter
from valora_jax.demo.random_adapter import write_random_adapter
from valora_jax.engine.engine import Engine
from valora_jax.engine.rounds import EVERYBODY_UNMERGED, Decision
from valora_jax.engine.sampling_params import SamplingParams
from valora_jax.lora.adapter import Adapter
from valora_jax.lora.combine import combine
from valora_jax.lora.mode import Mode
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
SPARE = "folded in for others"

type Inputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Model:
    folder: Path
    engine: Engine
    adapters: dict[str, Adapter]

    def run[Result](
        self,
        prompts: Sequence[TokensPrompt],
        adapters: str | Sequence[str | None] | None,
        ask: Callable[[Sequence[TokensPrompt], Sequence[str | None]], list[Result]],
    ) -> list[Result]:
        """Asks the engine for rows, in the mode that the environment wants."""
        rows = (
            [adapters] * len(prompts)
            if adapters is None or isinstance(adapters, str)
            else [*adapters]
        )
        match Mode(os.environ.get("VALORA_ORACLE_MODE", "unmerged")):
            case Mode.UNMERGED:
                with self._all_rows_are(Mode.UNMERGED, EVERYBODY_UNMERGED):
                    return ask(prompts, rows)
            case Mode.MIXTURE:
                for name in sorted({name for name in rows if name is not None}):
                    fold(self.engine, name)  # before it was measured it could not ride
                ref = fold(self.engine, SPARE)
                with self._all_rows_are(Mode.MIXTURE, Decision(folded=ref)):
                    return ask(prompts, rows)
            case Mode.MERGED:
                results = []
                for prompt, adapter in zip(prompts, rows, strict=True):
                    results += self._run_merged(prompt, adapter, ask)
                return results

    def _run_merged(self, prompt: TokensPrompt, adapter: str | None, ask: Callable) -> list:
        if adapter is None:  # its merged weights are the base's
            with self._all_rows_are(Mode.UNMERGED, EVERYBODY_UNMERGED):
                return ask([prompt], [None])
        ref = fold(self.engine, adapter)
        with self._all_rows_are(Mode.MERGED, Decision(folded=ref, only=frozenset([ref]))):
            return ask([prompt], [adapter])

    @contextlib.contextmanager
    def _all_rows_are(self, mode: Mode, decision: Decision) -> Iterator[None]:
        tokens = self.engine.parts.core.modes.tokens
        tokens.clear()
        with decided(self.engine, decision):
            yield
        # A request that is refused computes nothing.
        assert {m for m in tokens if tokens[m]} <= {mode}, f"rows ran {dict(tokens)}, not {mode}"


class Factory:
    """What the checker calls; see its docstring for the protocol."""

    def load(self, checkpoint_dir: str) -> Model:
        engine = Engine(checkpoint_dir, CONFIG, show_progress=False)
        with tempfile.TemporaryDirectory() as folder:
            spare = write_random_adapter(Path(folder), model=checkpoint_dir, rank=24, seed=0)
            engine.load_adapter(SPARE, spare)
        return Model(folder=Path(checkpoint_dir), engine=engine, adapters={})

    def forward(
        self, model: Model, inputs: Inputs, adapters: Sequence[str | None] | None = None
    ) -> np.ndarray:
        rows = model.run(
            _prompts(model, inputs),
            adapters,
            lambda prompts, names: model.engine.prompt_logits(prompts, adapter=names),
        )
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
        outputs = model.run(
            _prompts(model, inputs),
            adapters,
            lambda prompts, names: model.engine.generate(prompts, params, adapter=names),
        )
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
        outputs = model.run(
            _prompts(model, inputs),
            adapter,
            lambda prompts, names: model.engine.classify(prompts, adapter=names),
        )
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
