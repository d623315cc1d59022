"""What engine tests share as fixtures."""

import pytest

from tests.engine.engines import assert_nothing_is_held


@pytest.fixture
def nothing_is_left():
    """Fails a test after which an engine still holds pages, slots or references."""
    yield
    assert_nothing_is_held()
