"""A model of head width 64 says in bfloat16 what it says in float32, but for close calls."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from tests.engine.engines import ADAPTERS, CONFIG, GOLDENS, with_images
from valora_jax.engine import precision
from valora_jax.engine.engine import Engine
from valora_jax.engine.sampling_params import SamplingParams

# The tiny model with half as many heads, twice as wide: the same tensors, another model.
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
ADAPTERS_ASKED = (None, "a04_all_linear_r4", "a06_qv_r64", "a01_attn_lm_r8")
TEXTS = ("What is it?", "Which is larger?", "Hi", "USER: count to ten. ASSISTANT:")
TOKENS = 12
# Logits of tiny random models move by up to 0.5 when all of the arithmetic is bfloat16, in
# transformers as well; they lie within +-8.
TOLERANCE = 0.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "head-width-64"
    shutil.copytree(GOLDENS / "checkpoints" / "llava15-tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= HEADS
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclasses.dataclass(frozen=True)
class Run:
    """What an engine says: greedy tokens, their leads over the second, and logits of prompts."""

    tokens: list[tuple[int, ...]]
    leads: list[list[float]]
    logits_TV: np.ndarray


def run(folder, dtype: str) -> Run:
    prompts = [with_images(text, *range(i)) for i, text in enumerate(TEXTS)]
    config = dataclasses.replace(CONFIG, dtype=dtype, warm_up=False)
    with Engine(folder, config, show_progress=False) as engine:
        for name in filter(None, ADAPTERS_ASKED):
            engine.load_adapter(name, ADAPTERS / name)
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=TOKENS, logprobs=2)
        asked = list(itertools.product(prompts, ADAPTERS_ASKED))
        outputs = engine.generate(
            [prompt for prompt, _ in asked], params, adapter=[adapter for _, adapter in asked]
        )
        said = [output.outputs[0] for output in outputs]
        tops = [[sorted(t.logprob for t in top.values()) for top in a.logprobs or ()] for a in said]
        logits = engine.prompt_logits(prompts, adapter=list(ADAPTERS_ASKED))
    return Run(
        tokens=[a.token_ids for a in said],
        leads=[[top[-1] - top[-2] for top in of_one] for of_one in tops],
        logits_TV=np.concatenate(logits),
    )


@pytest.fixture(scope="module")
def want(folder):
    return run(folder, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_bfloat16_agrees_with_float32_but_for_close_calls(folder, want, dtype, monkeypatch):
    # On a CPU "auto" is both: prompts and decodes of several rows in bfloat16, of one in float32.
    monkeypatch.setattr(precision, "bfloat16_gain", lambda rows: 2.0)
    got = run(folder, dtype)
    np.testing.assert_allclose(got.logits_TV, want.logits_TV, rtol=0, atol=TOLERANCE)
    compared = 0
    for said, wanted, leads in zip(got.tokens, want.tokens, want.leads, strict=True):
        clear = next((i for i, lead in enumerate(leads) if lead < TOLERANCE), TOKENS)
        assert said[:clear] == wanted[:clear]
        compared += clear
    assert compared >= len(want.tokens)
