# Two commands do all the set-up on a machine that has Python and its package index:
#   make demo   the paper's table 1 on a small data set, in a few minutes
#   make test   everything that tests need, then all of them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Newest releases of the supported range that have wheels of both; a pair, because torchvision needs its own torch.
TORCH ?= torch==2.14.1 torchvision==0.29.1

.PHONY: help demo test lint docs readme clean

help:
	@echo "make demo    the paper's table 1 on a small data set, after installing what it needs"
	@echo "make test    ruff, mypy and all tests, after installing what they need"
	@echo "make lint    ruff and mypy alone"
	@echo "make docs    the site, in site/"
	@echo "make readme  the README's tables from benchmarks/results"
	@echo "make clean   remove what the others made"

.DEFAULT_GOAL := help

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $@

demo: $(VENV)/.demo
	$(BIN)/mcobj reproduce --table 1 --dataset digits --preset smoke

# One process a core, each with one thread: most tests have too little to do for two.
test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict

# The README's figures come from recorded results.
readme: $(VENV)/.demo
	$(BIN)/python benchmarks/readme.py

clean:
	rm -rf $(VENV) build dist site
