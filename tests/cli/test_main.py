"""The `valora` command as a whole: quick help, exit codes, one message for a mistake."""

import subprocess
import sys

import pytest

from tests.cli.tiny_engine import ADAPTERS, MODEL
from valora_jax import cli
from valora_jax.cli import convert_main, demo, main


def test_help_imports_no_jax():
    code = (
        "import sys; from valora_jax.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'flax', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in run.stdout
    assert "generate" in run.stdout
    assert "convert" in run.stdout
    assert run.stdout.splitlines()[-1] == "[]"


def test_help_of_generate_has_the_fields_of_both_dataclasses(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())  # as if on one line
    for part in ("--temperature", "--stop", "(default: 256)", "--engine.max-adapters", "--seed"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], "no such folder"),
        (["generate", MODEL], "give either --prompt or --input"),
        (["generate", MODEL, "--prompt", "x", "--temperature", "-1"], "temperature=-1.0, want"),
        (["generate", MODEL, "--prompt", "x", "--config", "nowhere.toml"], "nowhere.toml"),
        (["convert", "inspect", "nowhere"], "no such folder"),
        (["tune", "--minutes", "1"], "measured on an NVIDIA GPU, but jax runs on 'cpu' here"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(
    capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("valora")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_wrong_flag_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", str(MODEL), "--prompt", "x", "--engine.max-requests", "0"])
    assert end.value.code == 2
    assert "max_requests=0 must be at least 1" in capsys.readouterr().err


def test_the_traceback_is_shown_on_demand(monkeypatch):
    monkeypatch.setenv("VALORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="give either --prompt or --input"):
        main(["generate", str(MODEL)])


def test_an_interrupt_is_exit_code_130_and_no_traceback(capsys, monkeypatch):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.demo, "run", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "\nvalora: interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(command):
        raise AttributeError("a bug")

    monkeypatch.setattr(cli.demo, "run", broken)
    with pytest.raises(AttributeError):
        main(["demo"])


def test_convert_runs_under_both_names(capsys):
    folder = str(ADAPTERS / "a01_attn_lm_r8")
    assert main(["convert", "inspect", folder]) == 0
    first = capsys.readouterr().out
    assert convert_main(["inspect", folder]) == 0
    assert capsys.readouterr().out == first != ""


def test_the_demos_engine_compiles_few_shapes():
    assert demo.ENGINE.max_requests <= 4
    assert not demo.ENGINE.warm_up
