# `make help` lists the targets. Everything runs in .venv, which `make setup` makes and the other targets make if needed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,data,docs,report,sketches,tensorboard
# Passed to pip install, such as PIP_OPTIONS="--index-url URL" for an index that has torch's CPU build.
PIP_OPTIONS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
DATA ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHMARKS := $(filter-out bench_summary,$(basename $(notdir $(sort $(wildcard scripts/benchmarks/bench_*.py)))))
RUN_BENCHMARKS := failed=0; \
	for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m scripts.benchmarks.$$name $(BENCH_ARGS) || failed=1; done; \
	$(BIN)/python -m scripts.benchmarks.bench_summary; exit $$failed

.PHONY: help setup test lint docs demo bench test-gpu test-aot test-faults bench-gpu clean

help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  EXTRAS=$(EXTRAS)  PIP_OPTIONS  PYTEST_ARGS  BENCH_ARGS"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("vista needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[$(EXTRAS)]'
	@touch $@

setup: $(STAMP) ## make the virtual environment with vista and all it needs; say which torch build came
	@$(BIN)/python scripts/describe_environment.py

test: setup ## run the tests that need no GPU (but test-aot and test-faults), on all cores
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu and not aot and not faults and not docs" $(PYTEST_ARGS)

lint: setup ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup ## build the documentation site into build/site and check every link
	$(BIN)/python -m docs.build_site

demo: setup ## run the whole job and write a report; DATA=path/to/ml-1m (or another MovieLens folder) instead of the simulation
	$(BIN)/python -m scripts.demo $(if $(DATA),--data "$(DATA)")

bench: setup ## run all benchmarks on the CPU and list the bars met and missed; BENCH_ARGS=--quick for a first look
	@export CUDA_VISIBLE_DEVICES=; $(RUN_BENCHMARKS)

test-gpu: setup ## run the tests that need a GPU
	@$(BIN)/python scripts/describe_environment.py --require-gpu
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-aot: setup ## compile the Triton kernels for every target, width and dtype (some minutes, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m aot $(PYTEST_ARGS)

test-faults: setup ## try each promise of tests/faults thousands of times (two cores, up to 2 h; resumable), write docs/results/faults.md
	@failed=0; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m faults tests/faults $(PYTEST_ARGS) || failed=1; \
	PYTHONPATH=.:kernels $(BIN)/python -m tests.faults.table || failed=1; exit $$failed

bench-gpu: setup ## run all benchmarks with the GPU
	@$(BIN)/python scripts/describe_environment.py --require-gpu
	@$(RUN_BENCHMARKS)

clean: ## remove caches and build leftovers; .venv, data, runs and stores stay
	rm -rf build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
