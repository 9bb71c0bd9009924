# The project's commands. Each sets up what it needs; a second call installs nothing.
#   make setup      a .venv with everything, versions pinned by constraints.txt
#   make train      the main job: about two minutes of training on two cores, into runs/quickstart/
#   make test       lint, types and tests, a few minutes
#   make test-slow  what launches many processes or learns for long
#   make soak       half an hour of random faults against an undisturbed run (MINUTES=5 for less)
#   make test-multihost  two hosts made of network namespaces, as root; one is lost in the middle of a run
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train test test-slow test-multihost soak clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,deepspeed,eval,test]'
	mkdir -p .venv/package && ln -sfn ../.. .venv/package/minrnn
	touch $@

train: $(READY)
	$(BIN)/minrnn train --config quickstart

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

soak: $(READY)
	$(BIN)/python tests/soak.py --minutes $(or $(MINUTES),30)

test-multihost: $(READY)
	$(BIN)/python -m pytest -q tests/multihost

clean:
	rm -rf .venv runs mlruns mlflow.db*
