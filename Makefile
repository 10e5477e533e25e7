# `make` or `make help` lists what can be made. A fresh machine needs Python >= 3.11, git and make.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/gpu
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: help setup demo test test-slow test-all faults lint gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: .venv/installed ## the virtual environment .venv with the versions of constraints.txt

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,report]'
	touch $@

demo: setup ## the whole pipeline on a small world, in minutes on a CPU
	$(BIN)/python -m demo.run

test: setup ## the quick tests
	$(PYTEST)

test-slow: setup out/triton-3.6/installed ## the slow tests
	$(PYTEST) -m 'slow and not gpu' || [ $$? -eq 5 ] # 5: no test is marked slow

# The oldest Triton that the kernels are compiled with.
out/triton-3.6/installed:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target=$(@D) triton==3.6.0
	touch $@

test-all: test test-slow ## the quick tests, then the slow ones

faults: setup ## what becomes of kills, torn files, damaged bytes and our own mistakes: a table, in less than eight minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.faults

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A GPU machine comes with its own CUDA build of torch, and not with every library of the tests: no .venv, and only the
# files that hold GPU tests. The benchmarks come first, since their results are worth more, and have the GPU for
# themselves; then the tests, those of attention first, then the kernels', in four processes where pytest-xdist is there.
# Each has a limit in seconds, together less than eight minutes: the benchmarks end by themselves (their minutes, and time
# for start, clocks and the last turn), the tests are estimated at two minutes in four processes, five in one. What hangs
# is stopped, and what one has written stays, whatever becomes of the others.
STEP_MINUTES ?= 2.9
STEP_SECONDS ?= 205
LOSS_MINUTES ?= 1.3
LOSS_SECONDS ?= 108
TEST_SECONDS ?= 135
gpu: SHELL := /bin/bash
gpu: ## the benchmarks of the step and of the loss, then the GPU tests, with the machine's own Python; into $OUT, else out/gpu
	mkdir -p $(OUT)
	@status=0; set -o pipefail; export PYTHONUNBUFFERED=1 PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}"; \
	files=$$(grep -lE 'mark\.gpu|tests\.devices' tests/test_*.py | sort -r); \
	files="$$(grep attention <<<"$$files") $$(grep -v attention <<<"$$files")"; \
	processes=$$($(PYTHON) -c 'import xdist' >/dev/null 2>&1 && echo '-n 4'); set -x; \
	timeout -k 10 $(STEP_SECONDS) $(PYTHON) bench/step.py --device=cuda --minutes=$(STEP_MINUTES) --out_dir=$(OUT) 2>&1 \
		| tee $(OUT)/step.txt || status=1; \
	timeout -k 10 $(LOSS_SECONDS) $(PYTHON) bench/loss.py --device=cuda --minutes=$(LOSS_MINUTES) --out_dir=$(OUT) 2>&1 \
		| tee $(OUT)/loss.txt || status=1; \
	timeout -s INT -k 10 $(TEST_SECONDS) $(PYTHON) -m pytest -m gpu -v -rfEs --continue-on-collection-errors $$processes \
		--junitxml=$(OUT)/gpu_tests.xml $$files 2>&1 | tee $(OUT)/gpu_tests.txt || status=1; \
	exit $$status

clean: ## removes .venv and caches; data/ and out/ stay
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
