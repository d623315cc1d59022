"""What engine tests share as fixtures."""

import pathlib

import jax
import pytest

from tests.engine.engines import assert_nothing_is_held, forget_engines

HERE = pathlib.Path(__file__).parent


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drops the engines with the last of the tests here: other tests compile, too."""
    if nextitem is None or HERE not in nextitem.path.parents:
        forget_engines()
        jax.clear_caches()


@pytest.fixture
def nothing_is_left():
    """Fails a test after which an engine still holds pages, slots or references."""
    yield
    assert_nothing_is_held()
