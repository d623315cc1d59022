"""Every example runs, on the tiny golden checkpoint and real adapter folders."""

import importlib

import pytest

from tests.cli.tiny_engine import ADAPTERS, CONFIG, MODEL, ROOT

A, B = ADAPTERS / "a01_attn_lm_r8", ADAPTERS / "a19_attn_lm_r8_b"
EXAMPLES = {
    "generate": ((), "'The sky is' -> "),
    "chat_with_images": ((), " cached]"),
    "many_adapters": ((A, B), "refused: no adapter 'cars'; loaded: both, planes"),
    "stream": ((), "tokens so far: 24 24"),
    "convert_and_merge": ((A,), "decoder q, k, v, o of 4 layers, rank 8"),
}


def test_no_example_is_forgotten():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(capsys, name):
    arguments, shown = EXAMPLES[name]
    importlib.import_module(f"examples.{name}").main(MODEL, *arguments, config=CONFIG)
    assert shown in capsys.readouterr().out
