"""The valora_jax side of vs_transformers.py: the same lines in and out as hf_side.py.

load: {"model", "dtype", "adapters": {name: folder}} -> {"versions"}
run:  {"requests": [{"prompt", "image", "adapter"}], "new_tokens"}
      -> {"seconds", "first_token_s", "cpu_s", "prompt_tokens", "tokens"}
"""

import importlib.metadata
import json
import os
import sys
import time

from PIL import Image

from valora_jax.config import EngineConfig
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams

# Bounds the key-value pages: several contestants are in memory at once.
MAX_REQUEST_TOKENS = 1024


class Side:
    """Answers commands; every command is a method."""

    engine: Engine

    def load(self, *, model: str, dtype: str, adapters: dict[str, str]) -> dict:
        self.engine = Engine(
            model,
            EngineConfig(dtype=dtype, max_request_tokens=MAX_REQUEST_TOKENS),
            show_progress=False,
        )
        for name, folder in adapters.items():
            self.engine.load_adapter(name, folder)
        packages = ("valora-jax", "jax", "jaxlib", "flax")
        return {"versions": {name: importlib.metadata.version(name) for name in packages}}

    def run(self, *, requests: list[dict], new_tokens: int) -> dict:
        prompts = [
            {"prompt": r["prompt"], "multi_modal_data": {"image": _open(r["image"])}}
            for r in requests
        ]
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        adapters = [r["adapter"] for r in requests]
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        outputs = self.engine.generate(prompts, params, adapter=adapters)
        seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        first_token_s = max(o.metrics.first_token_s - o.metrics.arrival_s for o in outputs)
        return {
            "seconds": seconds,
            "first_token_s": first_token_s,
            "cpu_s": cpu_s,
            "prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs),
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        }


def _open(path: str) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def main() -> None:
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
