# Two commands: `make nightly` and `make test`. Both set up their own virtual environment first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.attnbench-ready
# pytest in parallel; each worker computes with one thread, or two workers fight over two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: nightly test format lint types imports tests tests-interpreter clean help

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

nightly: $(READY)  ## measure this machine, store, judge, render; prints where the pages are
	$(BIN)/attnbench nightly

test: $(READY) lint types imports tests tests-interpreter  ## everything CI runs

format: $(READY)  ## rewrite files the way `lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

tests: $(READY)
	$(PYTEST) -m "not interpreter"

# Triton's interpreter is chosen before kernels are decorated and excludes real launches: a
# process of its own.
tests-interpreter: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnbench needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $(READY)

clean:  ## remove the virtual environment and caches, never results
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis .import_linter_cache
