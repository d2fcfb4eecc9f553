# Each target sets itself up: the first run creates $(VENV) and installs the pinned dependencies.

VENV ?= .venv
PYTHON ?= python3
# Options for pip, for example an index that serves another build of torch.
PIP_ARGS ?=
# Threads of each process; tests start several processes.
THREADS ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL_SCRIPTS := .ci/run $(wildcard tools/*.sh examples/*.sh examples/*/*.sh)

# Preset of the demo's image tokenizer: tiny or tiny_vqgan.
TOKENIZER ?= tiny
SUFFIX := $(if $(filter-out tiny,$(TOKENIZER)),-$(TOKENIZER))

ifdef DATA
# A trailing slash would leave the name empty.
DEMO_ARGS := --output "runs/data-$(notdir $(patsubst %/,%,$(DATA)))$(SUFFIX)" --data "$(DATA)"
else
DEMO_ARGS := --output "runs/demo$(SUFFIX)"
endif
DEMO_ARGS += --image-tokenizer "$(TOKENIZER)"

.DEFAULT_GOAL := help
.PHONY: help demo test test-faults check clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'
	@echo
	@echo '  make demo DATA=FOLDER   the same path on your own WebDataset tars'
	@echo '  make demo TOKENIZER=tiny_vqgan   the same path with a VQGAN'
	@echo '  PYTHON=python3.12  VENV=.venv  PIP_ARGS="--extra-index-url URL" may be set too'

$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## Tars to tokens, training, pictures and a report, on two CPU cores
	$(BIN)/python examples/demo/run.py $(DEMO_ARGS)

test: $(STAMP) ## The whole test suite
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest

# Minutes for the campaigns of test-faults; what is left is done the next time.
MINUTES ?= 600

test-faults: $(STAMP) ## The slow suite: every layout, and campaigns of faults against training
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python tools/train_faults.py --output runs/faults --minutes $(MINUTES)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -m slow

check: $(STAMP) ## Format, lint, types, import directions, Dockerfile, shell syntax
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	for script in $(SHELL_SCRIPTS); do bash -n "$$script" || exit 1; done

clean: ## Remove caches and build output; runs/ and the environment stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find megatron_cogview tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} +
