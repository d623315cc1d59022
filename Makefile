# Every target works alone on a fresh clone: each one sets up what it needs first.

PYTHON_VENV := .venv/bin/python
READY := .venv/.ready
HOPPER := .venv/hopper/.ready
LOCK := uv pip compile --quiet --universal --python-version 3.12 --generate-hashes \
	--no-emit-index-url --no-header -c requirements/pins.in

.PHONY: help setup check test demo lock clean

help: ## Lists the targets.
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

setup: $(READY) ## Makes .venv with the pinned packages; PYTHON=... names the interpreter of a new one.

$(READY): pyproject.toml requirements/dev.txt .ci/setup .ci/find-python
	@.ci/setup .venv
	@touch $@

check: setup ## Lint, format, types, and the floors between packages.
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright
	$(PYTHON_VENV) -m pytest -q tests/test_floors.py

# Compiles kernels for a Hopper GPU that is not there.
$(HOPPER): requirements/hopper.txt | $(READY)
	$(PYTHON_VENV) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		--upgrade --target .venv/hopper -r requirements/hopper.txt
	@touch $@

test: check $(HOPPER) ## The checks, then every test that needs no GPU.
	$(PYTHON_VENV) -m pytest -m "not gpu" -n 2 --dist loadfile
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/hopper NEEDS_CUDA_PLUGIN=1 $(PYTHON_VENV) -m pytest -n 2 \
		tests/pallas_kernels/test_hopper_compile.py

demo: setup ## Builds the demo model (once, in a cache folder) and asks it about pictures.
	.venv/bin/valora demo

lock: ## Resolves requirements/*.txt anew from pyproject.toml and pins.in; needs uv.
	$(LOCK) pyproject.toml --extra demo --extra dev -o requirements/dev.txt
	$(LOCK) pyproject.toml -c requirements/dev.txt -o requirements/base.txt
	$(LOCK) pyproject.toml -c requirements/dev.txt --extra cuda13 -o requirements/cuda13.txt
	$(LOCK) --group hopper -o requirements/hopper.txt

clean: ## Removes .venv and every cache of the tools and tests.
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
