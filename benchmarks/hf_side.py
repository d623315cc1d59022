"""The transformers + PEFT side of vs_transformers.py; runs in an environment of its own.

Reads one JSON object a line from standard input, answers each with one on standard output, and
waits without using the CPU in between. Imports nothing of valora_jax.

    load: {"model", "dtype", "threads", "adapters": {name: folder}} -> {"versions"}
    run:  {"requests": [{"prompt", "image", "adapter"}], "new_tokens", "batch", "mixed"}
          -> {"seconds", "first_token_s", "cpu_s", "prompt_tokens", "tokens"}

`first_token_s` is when the last request got its first token.
"""

import json
import os
import sys
import time

import peft
import torch
import transformers
from PIL import Image

BASE = "__base__"  # PEFT's name for no adapter in a mixed batch


class _Clock(transformers.LogitsProcessor):
    """Notes when each step's logits are there; changes nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores):
        self.times.append(time.perf_counter())
        return scores


class Side:
    def load(self, model, dtype, threads, adapters):
        """Loads the checkpoint and the adapters, all in `dtype`."""
        torch.set_num_threads(threads)
        self.processor = transformers.AutoProcessor.from_pretrained(model)
        base = transformers.LlavaForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.dtype = base.dtype
        # PEFT keeps adapters in float32 by default, and casts activations at every linear.
        (first, folder), *rest = adapters.items()
        self.model = peft.PeftModel.from_pretrained(
            base, folder, adapter_name=first, autocast_adapter_dtype=False
        )
        for name, folder in rest:
            self.model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
        self.model.eval()
        self.model.generation_config.eos_token_id = None  # every answer has the same length
        versions = {m.__name__: m.__version__ for m in (transformers, peft, torch)}
        return {"versions": versions}

    def run(self, requests, new_tokens, batch, mixed):
        """Answers the requests in batches of `batch`; not `mixed`: one adapter a batch."""
        images = [_open(r["image"]) for r in requests]
        tokens, prompt_tokens, clock = [None] * len(requests), 0, _Clock()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for group in _groups(requests, batch, mixed):
            clock.times.clear()
            chosen, chosen_images = [requests[i] for i in group], [images[i] for i in group]
            inputs = self._inputs(chosen, chosen_images)
            out = self._generate(inputs, [r["adapter"] for r in chosen], new_tokens, mixed, clock)
            prompt_tokens += int(inputs["attention_mask"].sum())
            for i, row in zip(group, out.tolist(), strict=True):
                tokens[i] = row[inputs["input_ids"].shape[1] :]
        return {
            "seconds": time.perf_counter() - start_s,
            "first_token_s": clock.times[0] - start_s,
            "cpu_s": time.process_time() - start_cpu_s,
            "prompt_tokens": prompt_tokens,
            "tokens": tokens,
        }

    def _inputs(self, requests, images):
        inputs = self.processor(
            text=[r["prompt"] for r in requests],
            images=images,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return inputs

    def _generate(self, inputs, adapters, new_tokens, mixed, clock):
        options = dict(
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            logits_processor=[clock],
        )
        with torch.inference_mode():
            if mixed:
                names = [a or BASE for a in adapters]
                return self.model.generate(**inputs, **options, adapter_names=names)
            if adapters[0] is None:
                with self.model.disable_adapter():
                    return self.model.generate(**inputs, **options)
            self.model.set_adapter(adapters[0], inference_mode=True)
            return self.model.generate(**inputs, **options)


def _open(path):
    with Image.open(path) as file:
        return file.convert("RGB")


def _groups(requests, batch, mixed):
    """Indices of the requests of each batch."""
    order = list(range(len(requests)))
    if mixed:
        return [order[i : i + batch] for i in range(0, len(order), batch)]
    of_adapter = {}
    for i in order:
        of_adapter.setdefault(requests[i]["adapter"], []).append(i)
    return [same[i : i + batch] for same in of_adapter.values() for i in range(0, len(same), batch)]


def main():
    # Libraries print; only answers may go to the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Side()
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(side, command.pop("op"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
