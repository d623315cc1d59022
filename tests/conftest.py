"""One environment for every test: offline, deterministic, compilations kept between runs.

The variables are set before jax or transformers are imported; a value from outside wins. Tests of
the host side stay free of jax: nothing here imports it unless a GPU test is about to run.
"""

import os
import pathlib

import hypothesis
import pytest

CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
# jax keeps only compilations over 1 s by default; those of the tiny models are shorter, and many.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads warn when a test forks

# The same examples in every run. No deadline: the first call of a jitted function compiles it.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import jax  # slow, and needed by the GPU tests alone

        if jax.default_backend() != "gpu":
            pytest.skip("needs a Hopper GPU")
