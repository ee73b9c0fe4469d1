# Everything installs into .venv by itself; `make help` lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RANKS ?= 2
DEMO_RUN := runs/demo

.PHONY: help install data demo test test-slow test-slurm lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch first: a resolver that meets deepspeed's plain "torch" would fetch the newest CUDA build (several GB).
	$(PIP) install --quiet "torch>=2.13,<2.14" -c constraints.txt
	$(PIP) install --quiet -e ".[dev]" -c constraints.txt
	@touch $@

install: $(VENV)/.installed  ## create .venv and install everything (torch first)

data: install  ## raw sample -> tokenizer -> shards in data/sample
	$(BIN)/python -m data_prep run --config configs/data/sample.json

demo: data  ## raw text -> tokenizer -> shards -> 2-rank DeepSpeed training -> validation perplexity
	@# A free port: 29500, the launcher's default, may belong to another job of this machine.
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(RANKS) \
	  --master_port $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') \
	  launch/pretrain.py \
	  --config configs/switchall_tiny.json --run-dir $(DEMO_RUN)
	@echo
	@echo "Watch it:   $(BIN)/tensorboard --logdir $(DEMO_RUN)/tensorboard"
	@echo "Metrics:    $(DEMO_RUN)/metrics.jsonl"

FAST := -m "not slow and not slurm"
# Tests of one process each, which share the cores; all others start ranks of their own and take turns.
ALONE := tests/model tests/data_prep tests/benchmarks

test: install  ## the fast tests
	$(BIN)/python -m pytest $(FAST) -n 2 $(ALONE)
	$(BIN)/python -m pytest $(FAST) $(ALONE:%=--ignore=%)

test-slow: install  ## the slow tests: the real launcher, kill and resume
	$(BIN)/python -m pytest -m "slow and not slurm"

test-slurm: install  ## a real two-node SLURM on this host: signals, requeues, lost nodes, data preparation arrays
	$(BIN)/python -m pytest -v -m slurm tests/slurm

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment, prepared data and runs of the demo
	rm -rf $(VENV) data/sample $(DEMO_RUN)
