"""Requests are real, different and the same every time."""

import itertools
import shutil

import pytest

from benchmarks.workload import make_round
from tests.conftest import CACHE

MODEL = CACHE.parent.parent / "tests" / "goldens" / "checkpoints" / "llava15-tiny"


def round_of(folder, index, count=6):
    return make_round(folder, model=MODEL, index=index, count=count, adapters=["a", "b", None])


def test_requests_take_adapters_in_turn(tmp_path):
    assert [r.adapter for r in round_of(tmp_path, 0)] == ["a", "b", None, "a", "b", None]


def test_a_prompt_is_rendered_with_one_image(tmp_path):
    assert all(r.prompt.count("<image>") == 1 for r in round_of(tmp_path, 0))


def test_no_two_requests_share_an_image(tmp_path):
    files = [r.image for index in range(3) for r in round_of(tmp_path, index)]
    images = [file.read_bytes() for file in files]
    assert all(a != b for a, b in itertools.combinations(images, 2))


def test_a_round_is_the_same_every_time(tmp_path):
    first = [r.image.read_bytes() for r in round_of(tmp_path / "one", 1)]
    assert first == [r.image.read_bytes() for r in round_of(tmp_path / "two", 1)]


def test_a_checkpoint_without_a_chat_template_is_refused(tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(FileNotFoundError, match=r"chat_template\.jinja"):
        make_round(tmp_path, model=model, index=0, count=1, adapters=["a"])
