# `make` alone says what there is. Everything below does its own set-up, once.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup train test bench lint clean

PYTHON ?=
TORCH_INDEX_URL ?=
CONFIG ?=
ARGS ?=
SLOW ?=
NPROC ?=
export PYTHON TORCH_INDEX_URL

help:
	@echo 'make train   set up where needed, then train on the embedded digits (two processes)'
	@echo '             CONFIG=configs/resnet20.yaml trains that instead, and goes on where a killed run stopped'
	@echo '             ARGS="train.epochs=3" adds settings; NPROC=4 sets the processes (default: GPUs, else 2)'
	@echo 'make test    set up where needed, then the tests; SLOW=1 adds the slow ones; ARGS="-k loader" goes to pytest'
	@echo 'make bench   the benchmarks; ARGS="loader" says which'
	@echo 'make lint    ruff and mypy'
	@echo 'make setup   system packages for FFCV, and .venv with the pinned Python packages'
	@echo '             PYTHON=python3.12 picks the interpreter (3.11 to 3.13)'
	@echo '             TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu takes torch from there (no CUDA, 3 GB less)'
	@echo 'make clean   remove .venv and caches; data and runs stay'

setup:
	@bash launch/setup.sh

# The embedded run always starts anew; any other goes on from its last checkpoint. The launcher counts
# the GPUs as the trainer does; PYTHON is the one that .venv was made of.
train: setup
	@PYTHON=.venv/bin/python NPROC='$(NPROC)' exec launch/single_node.sh \
	  $(if $(CONFIG),'$(CONFIG)',configs/digits.yaml run.overwrite=true) $(ARGS)

test: setup
	@.venv/bin/python -m pytest -n 2 --dist loadgroup $(if $(SLOW),,-m 'not slow and not gpu') $(ARGS)

bench: setup
	@.venv/bin/python -m dist_resnet.bench $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .setup.lock .ruff_cache .mypy_cache .pytest_cache .hypothesis *.egg-info build
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
