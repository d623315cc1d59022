"""`valora generate` from flags to output."""

import json

import pytest

from tests.cli.tiny_engine import ADAPTERS, FLAGS, IMAGES, MODEL
from valora_jax.cli import main
from valora_jax.cli.generate import Generate, run


def generate(*arguments):
    return main(["generate", str(MODEL), *map(str, arguments), "--max-tokens", "4", *FLAGS])


def test_a_prompt_is_streamed_with_its_speed_on_stderr(capsys):
    assert generate("--prompt", "Hello") == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "4 answer tokens, first after" in captured.err


def test_json_has_the_adapter_and_the_usage(capsys):
    folder = ADAPTERS / "a01_attn_lm_r8"
    flags = ("--image", IMAGES / "a_wide.png", "--adapter", f"a={folder}", "--json")
    assert generate("--prompt", "Hello", *flags) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["adapter"] == "a"
    assert answer["usage"]["completion_tokens"] == 4
    assert "adapter a: decoder q, k, v, o of 4 layers, rank 8" in captured.err


def test_a_file_of_requests_is_answered_into_another(capsys, tmp_path):
    lines = [{"prompt": "One", "id": 7}, {"prompt": "Two", "adapter": "b"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "small.toml").write_text("[engine]\nmax_requests = 3\n")
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert generate(*files, "--config", tmp_path / "small.toml") == 1
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["id"] == 7
    assert first["outputs"][0]["text"]
    assert second == {"id": 2, "error": "no adapter 'b'; loaded: none"}
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{tmp_path / 'in.jsonl'}:2: no adapter 'b'" in captured.err
    assert "[1 of 2 requests answered]" in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(), "give either --prompt or --input"),
        (dict(prompt="x", input="x"), "give either --prompt or --input"),
        (dict(input="x", json=True), "belong to --prompt"),
        (dict(prompt="x", output="x"), "--output belongs to --input"),
        (dict(prompt="x", adapter=("a",)), "--adapter 'a', want name=FOLDER"),
        (dict(prompt="x", adapter=("a=1", "a=2")), "'a' is given twice"),
        (dict(prompt="x", adapter=("a=1", "b=2")), "say with --use which of them answers: a, b"),
        (dict(prompt="x", adapter=("a=1",), use="b"), "--use 'b' is not among"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(ValueError, match="do not go together") as error:
        run(Generate(model="nowhere", **flags))
    assert message in str(error.value)
