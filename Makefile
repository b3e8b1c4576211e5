# make run: the demonstration. make test: lint, types and the test suite. Both set up .venv themselves.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_AUTH_MODE = disabled
export RAY_USAGE_STATS_ENABLED = 0
export OMP_NUM_THREADS ?= 1
# Driver kills per policy, and how long the other fault tests are: 20 is all of it, 4 a quick look. TEST_MINUTES=20 begins no
# further test after 20 minutes.
export FAULTS ?= 20

.PHONY: run test lint faults hosts docs browser image-check clean

$(STAMP): pyproject.toml constraints.txt $(wildcard tools/torchvision-cpu-shim/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-}}" $(BIN)/uv pip install --quiet --python $(BIN)/python \
		--compile-bytecode --constraint constraints.txt --editable '.[dev]' ./tools/torchvision-cpu-shim
	touch $@

run: $(STAMP)
	$(BIN)/python -m experiments.digits

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	tools/sandboxed $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not ray"
	tools/sandboxed $(BIN)/python -m pytest -q -m "ray and not slow"

faults: $(STAMP)
	tools/sandboxed $(BIN)/python -m pytest -q -rs -m "slow and not hosts"

hosts: $(STAMP)
	tools/sandboxed $(BIN)/python -m pytest -q -m hosts

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --site-dir build/site

# Chromium, which a test of the report's page needs. As root, on Debian and its like; without it that test is skipped, or
# fails where CI=true.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install \
		-qy --no-install-recommends chromium; }

# Needs root and buildah, and about 5 minutes. BASE_IMAGE and pip's settings are taken from the environment.
image-check:
	docker/image_check.sh

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
