"""Conversations with images, in OpenAI's form, through the model's chat template.

    python examples/chat_with_images.py [MODEL]

The demo model reads the pictures, but what it says about them is untrained.
"""

import sys
from pathlib import Path

from valora_jax.config import EngineConfig
from valora_jax.demo import ensure_demo_checkpoint
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams

IMAGES = Path(__file__).parent / "images"


def main(model=None, config=None):
    config = config or EngineConfig(max_requests=4, max_tokens_per_step=64, warm_up=False)
    with Engine(model or ensure_demo_checkpoint(), config) as engine:
        params = SamplingParams(temperature=0, max_tokens=16)

        # An image is a path, bytes, a data: URL, a PIL image or a uint8 array.
        question = [
            {"type": "image", "image": IMAGES / "chelsea.jpg"},
            {"type": "text", "text": "What animal is this?"},
        ]
        messages = [{"role": "user", "content": question}]
        (first,) = engine.chat(messages, params)
        print(first.outputs[0].text)

        # A conversation goes on by appending. What it shares with the one before is not computed
        # again: its key-value pages are found by their content, pictures included.
        messages += [
            {"role": "assistant", "content": first.outputs[0].text},
            {"role": "user", "content": "What colour is it?"},
        ]
        (second,) = engine.chat(messages, params)
        tokens = len(second.prompt_token_ids)
        print(f"{second.outputs[0].text} [{second.metrics.cached_tokens} of {tokens} cached]")

        # Several images in one message, and several conversations in one batch.
        pair = [
            {"type": "image", "image": IMAGES / "coffee.jpg"},
            {"type": "image", "image": IMAGES / "rocket.jpg"},
            {"type": "text", "text": "What do these have in common?"},
        ]
        chats = [[{"role": "user", "content": content}] for content in (pair, question)]
        for output in engine.chat(chats, params):
            print(output.outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:2])
