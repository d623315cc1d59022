"""`valora bench`: flags, and one simulated replay from the command line to a plot."""

import json
import subprocess
import sys

import pytest

from valora_jax.cli import main


def test_help_has_the_flags_of_a_replay(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "replay", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("--simulate", "--no-bound", "--slo.ttft-ms", "--engine.max-requests", "--zipf"):
        assert part in text


def test_a_simulation_imports_no_jax():
    code = (
        "import sys; from valora_jax.cli import main\n"
        "main('bench replay --simulate --seconds 1 --policies valora'.split())\n"
        "print(sorted({'jax', 'flax', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_records_of_a_replay_can_be_drawn(capsys, tmp_path):
    file, folder = tmp_path / "records.jsonl", tmp_path / "plots"
    flags = ["--simulate", "--seconds", "1", "--policies", "valora", "unmerged", "--no-bound"]
    assert main(["bench", "replay", *flags, "--rates", "3", "--output", str(file)]) == 0
    records = map(json.loads, file.read_text().splitlines())
    assert [record["policy"] for record in records] == ["valora", "unmerged"]
    capsys.readouterr()
    assert main(["bench", "plot", str(file), str(folder)]) == 0
    drawn = capsys.readouterr().out.split()
    assert drawn == [str(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay"], "give one of --model, --shapes and --simulate"),
        (["replay", "--simulate", "--trace", "nowhere.json"], "nowhere.json"),
        (["replay", "--model", "nowhere"], "nowhere"),
        (["plot", "nowhere.jsonl", "plots"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(
    capsys, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("valora")
    assert message in captured.err


def test_an_objective_out_of_range_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "replay", "--simulate", "--slo.ttft-ms", "0"])
    assert end.value.code == 2
    assert "ttft_ms=0.0 must be positive" in capsys.readouterr().err
