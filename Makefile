# make demo | test | test-multinode | lint | test-gpu | clean. Everything installs itself into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The Mooncake wheel: by the CUDA version of the driver, `cpu` without one. Override: make EXTRA=cuda12
EXTRA ?= $(shell scripts/choose-extra)
STAMP := $(VENV)/.installed-$(EXTRA)

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo test test-multinode lint format test-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/system-packages
	scripts/system-packages $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),dev]'
	@touch $@

demo: setup
	$(BIN)/tidepool demo

test: setup
	$(BIN)/python -m pytest

# Hosts are network namespaces: needs root, iproute2, util-linux and nftables; under 15 minutes.
test-multinode: setup
	scripts/multinode-tools
	$(BIN)/python -m pytest -m multinode tests/multinode

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	scripts/run-mypy $(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# On a machine with a GPU.
test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests/gpu

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .hypothesis
