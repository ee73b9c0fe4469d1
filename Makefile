# Everything installs into .venv by itself; `make help` lists the targets. No path is absolute and every program runs as a
# module: names with spaces or brackets, whose venv has no working console scripts, are as good as others.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
  "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && \
  command -v "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is written when a module is first imported: pip would compile thousands of files that nobody imports, for half
# a minute on one core.
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Half a gigabyte comes as one file: a bar for who watches, and no line of it in a log.
INSTALL := $(PIP) install --no-compile --progress-bar $(if $(MAKE_TERMOUT),on,off)
# Some container images set it. Then nothing is ever written, and each process, so each rank of each run, compiles torch
# and deepspeed anew for seconds.
unexport PYTHONDONTWRITEBYTECODE
# Of the demo. Two, so that something is parallel, but where there is one GPU: ranks do not share one.
RANKS ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')),1,2)
DEMO_RUN := runs/demo

# CUDA=cpu, cu126 (for drivers older than 580) or cu130: that build of torch, from PyTorch's own index. Without it: what
# pip finds first, on plain PyPI the CUDA 13 build (3 GB to download, 6 GB on the disk).
CUDA ?=
PINS := constraints.txt
ifneq ($(CUDA),)
ifeq ($(filter $(CUDA),cpu cu126 cu130),)
$(error CUDA=$(CUDA): choose CUDA=cpu, CUDA=cu126 or CUDA=cu130)
endif
TORCH := torch==$(shell sed -nE 's/^torch==([0-9.]+).*/\1/p' constraints.txt)+$(CUDA)
INDEX := --extra-index-url https://download.pytorch.org/whl/$(CUDA)
# pip itself then blames the versions that were asked for.
UNREACHED := || { echo "error: only download.pytorch.org has this torch; where pip cannot reach it, omit CUDA="; exit 1; }
ifneq ($(CUDA),$(shell cat $(VENV)/.installed 2>/dev/null))
.PHONY: $(VENV)/.installed
endif
else
TORCH := torch
endif
ifeq ($(CUDA),cu126)
# Of CUDA's libraries we pin those of CUDA 13. Every build of torch pins its own, so ours are not missed.
PINS := $(VENV)/constraints.txt
endif

.PHONY: help install doctor lock data demo test test-slow test-slurm lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(VENV)/.installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || { echo \
	  "error: Python 3.11 to 3.14 is needed; install one, or name it: make install PYTHON=/path/to/python3.12"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@[ $(PINS) = constraints.txt ] || grep -vE '^(cuda|nvidia)-' constraints.txt > $(PINS)
	@# torch first and alone, so that this line decides which build of it the others find installed.
	$(INSTALL) "$(TORCH)" -c $(PINS) $(INDEX) $(UNREACHED)
	@# megatron-core has wheels up to Python 3.13; its build from source calls `python3`, which must be this one.
	@# While pip looks up packages, the other core compiles torch's bytecode: half a minute, which the import below would
	@# take. Whatever this says, that import does again.
	TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -c "import torch._dynamo, torch._inductor.compile_fx" >/dev/null 2>&1 & \
	PATH="$$PWD/$(BIN):$$PATH" $(INSTALL) -e ".[dev]" -c $(PINS); \
	status=$$?; wait; exit $$status
	@# So that `deepspeed` runs where this path has a space.
	$(BIN)/python launch/console_scripts.py
	@# What a rank imports (the list that tests/test_harness.py keeps whole), once, so that its bytecode is there for
	@# programs that make does not start.
	$(BIN)/python -c "import tests.harness_preload" >/dev/null
	@echo "$(CUDA)" > $@

install: $(VENV)/.installed  ## create .venv and install everything; CUDA=cpu, cu126 or cu130 chooses the build of torch

doctor:  ## what this machine has, what is missing and how to get it (before or after make install)
	@python="$(BIN)/python"; [ -x "$$python" ] || python="$(PYTHON)"; "$${python:-python3}" launch/doctor.py

lock: install  ## write constraints.txt anew, from pyproject.toml and PyPI; pins that still fit stay
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/python -m uv --no-config pip compile --quiet --universal \
	  --python-version 3.11 --all-extras --no-annotate pyproject.toml --output-file constraints.txt

data: install  ## raw sample -> tokenizer -> shards in data/sample
	$(BIN)/python -m data_prep run --config configs/data/sample.json

demo: data  ## raw text -> tokenizer -> shards -> DeepSpeed training in 2 ranks (RANKS=) -> its curves -> three sentences
	@# A free port: 29500, the launcher's default, may belong to another job of this machine.
	@# Without its log, whose last line would stand below ours, and without its warning that there is no GPU.
	command -v nvidia-smi >/dev/null || command -v rocm-smi >/dev/null || export DS_ACCELERATOR=cpu; \
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python -m deepspeed.launcher.runner --log_level critical --num_gpus $(RANKS) \
	  --master_port $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') \
	  launch/pretrain.py \
	  --config configs/switchall_tiny.json --run-dir $(DEMO_RUN)
	@echo
	@$(BIN)/python launch/compare.py $(DEMO_RUN)
	@echo
	@echo "The model continues three sentences (python launch/generate.py $(DEMO_RUN) --interactive continues yours):"
	@$(BIN)/python launch/generate.py $(DEMO_RUN) --prompt "The first" --prompt "In the" --prompt "It is" \
	  --tokens 60 --until . --seed 1
	@echo
	@echo "Watch it:   $(BIN)/python -m tensorboard.main --logdir $(DEMO_RUN)/tensorboard"
	@echo "Metrics:    $(DEMO_RUN)/metrics.jsonl"

FAST := -m "not slow and not slurm"
# Two workers on two cores: a test that starts ranks leaves a core idle while they start, wait for each other or are one.
# worksteal keeps the tests of a file, which share what they prepare, on one worker as long as both are busy.
WORKERS := -n 2 --dist worksteal

test: install  ## the fast tests
	$(BIN)/python -m pytest $(FAST) $(WORKERS)

test-slow: install  ## the slow tests: the real launcher, kill and resume
	$(BIN)/python -m pytest -m "slow and not slurm"

test-slurm: install  ## a real two-node SLURM on this host: signals, requeues, lost nodes, data preparation arrays
	$(BIN)/python -m pytest -v -m slurm tests/slurm

lint: install  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:  ## remove the environment, prepared data and runs of the demo
	@# Each by the file that only make wrote there: a folder of that name without it is somebody else's.
	@for made in "$(VENV)/.installed" data/sample/manifest.json "$(DEMO_RUN)/events.jsonl"; do \
	  if [ -e "$$made" ]; then rm -rf "$$(dirname "$$made")"; fi; done
