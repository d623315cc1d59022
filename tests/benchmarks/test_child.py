"""Commands and answers of a child process."""

import sys

import pytest

from benchmarks.child import Child

ECHO = """
import json, os, sys
for line in sys.stdin:
    command = json.loads(line)
    if command["op"] == "fail":
        sys.exit("out of memory, say")
    print(json.dumps(command | {"setting": os.environ.get("SETTING")}), flush=True)
"""


@pytest.fixture
def log(tmp_path):
    return tmp_path / "child.log"


def test_a_command_gets_its_answer(log):
    with Child([sys.executable, "-c", ECHO], log=log, environment={"SETTING": "on"}) as child:
        assert child.ask("load", number=1) == {"op": "load", "number": 1, "setting": "on"}
        assert child.ask("run")["op"] == "run"


def test_a_child_that_ends_is_reported_with_its_log(log):
    with Child([sys.executable, "-c", ECHO], log=log) as child:
        with pytest.raises(RuntimeError, match=r"ended with 1 at 'fail'(.|\n)*out of memory, say"):
            child.ask("fail")
        with pytest.raises(RuntimeError, match="at 'again'"):
            child.ask("again")
