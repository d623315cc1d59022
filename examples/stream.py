"""Streams: text as it grows, several at once, and one that is cut short.

python examples/stream.py [MODEL]
"""

import itertools
import sys

from valora_jax.config import EngineConfig
from valora_jax.demo import ensure_demo_checkpoint
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams


def main(model=None, config=None):
    config = config or EngineConfig(max_requests=4, max_tokens_per_step=64, warm_up=False)
    with Engine(model or ensure_demo_checkpoint(), config) as engine:
        params = SamplingParams(temperature=0, max_tokens=24)

        # Each output holds the whole answer so far.
        shown = 0
        for output in engine.stream("The three primary colours are", params):
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
        print()

        # Streams that are open at the same time share the engine's steps, whichever is read.
        streams = [engine.stream(f"{animal}s live in", params) for animal in ("Lion", "Whale")]
        for outputs in itertools.zip_longest(*streams):
            lengths = [len(output.outputs[0].token_ids) if output else "-" for output in outputs]
            print("tokens so far:", *lengths)

        # Closing a stream ends its request, and frees its pages.
        stream = engine.stream("Count to one thousand:", params)
        print(repr(next(stream).outputs[0].text), "- enough")
        stream.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
