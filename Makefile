# `make train` and `make test` need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What the rest stands on, without PyTorch, in some minutes: for a second Python.
SMOKE := $(addprefix tests/,ops/test_all_reduce.py test_augment.py checkpoints/test_checkpoints.py \
	test_input_pipeline.py parallel/test_hardware.py parallel/test_several_devices.py)

.PHONY: train test test-all test-slow test-smoke lint docs bench reproduce clean
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

# Compiling is most of its time, so the programs are left unoptimised; `test-all` optimises the rest a
# little, of which some run long.
test: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" \
		$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The extended tests too: every case of what `test` has one or two of.
test-all: test
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=1" \
		$(BIN)/python -m pytest -n 2 --dist worksteal -m "extended and not slow" $(ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow $(ARGS)

test-smoke: $(VENV)/.installed
	$(PIP) -e . pytest pytest-xdist
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(SMOKE) $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# The site, in build/site; a warning is an error. Docstrings are read, not imported: the extra `docs`
# alone is enough, in an environment of its own.
docs:
	@test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		mkdocs mkdocs-material 'mkdocstrings[python]'
	$(VENV)-docs/bin/python -m mkdocs build --strict

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.throughput $(ARGS)

reproduce: $(VENV)/.installed-test
	$(BIN)/python -m experiments.reproduce $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
