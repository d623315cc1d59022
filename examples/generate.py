"""Prompts in, answers out: sampling, several answers, log-probabilities.

python examples/generate.py [MODEL]
"""

import sys

from valora_jax.config import EngineConfig
from valora_jax.demo import ensure_demo_checkpoint
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams


def main(model=None, config=None):
    # Without warm-up a step's shape compiles when it is first met: quicker for a short script.
    config = config or EngineConfig(max_requests=4, max_tokens_per_step=64, warm_up=False)
    with Engine(model or ensure_demo_checkpoint(), config) as engine:
        # All prompts of a call share the engine's steps; the answers come in the prompts' order.
        prompts = ["The sky is", "Water boils at", "The opposite of hot is"]
        for output in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8)):
            print(repr(output.prompt), "->", repr(output.outputs[0].text))

        # Sampling parameters may differ from prompt to prompt. A seed makes an answer repeatable.
        params = SamplingParams(n=2, temperature=0.8, top_p=0.9, seed=7, max_tokens=8, logprobs=1)
        (output,) = engine.generate("Once upon a time", params)
        for answer in output.outputs:
            print(f"{answer.index}: {answer.text!r} ({answer.finish_reason})")
            for token, scores in zip(answer.token_ids, answer.logprobs, strict=True):
                print(f"   {scores[token].decoded_token!r} {scores[token].logprob:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
