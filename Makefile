# `make train` and `make test` need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What the rest stands on, without PyTorch, in some minutes: for a second Python.
SMOKE := $(addprefix tests/test_,all_reduce.py augment.py checkpoints.py evaluate_predict.py \
	feed.py hardware.py several_devices.py)

.PHONY: train test test-slow test-smoke lint bench reproduce clean
.DEFAULT_GOAL := train

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; name it with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed

# ARGS passes options on: make train ARGS="--epochs 5"
train: $(VENV)/.installed
	$(BIN)/python -m cifar_jax.train --model dropout_cnn --fallback-shapes10 $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow $(ARGS)

test-smoke: $(VENV)/.installed
	$(PIP) -e . pytest pytest-xdist
	$(BIN)/python -m pytest -n 2 --dist worksteal $(SMOKE) $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.throughput $(ARGS)

reproduce: $(VENV)/.installed-test
	$(BIN)/python -m experiments.reproduce $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
