# The project's commands. Each sets up what it needs; a second call installs nothing.
#   make setup      a .venv with everything, versions pinned by constraints.txt
#   make train      the main job: about two minutes of training on two cores, into runs/quickstart/
#   make test       lint, types and tests, a few minutes
#   make test-slow  what launches many processes or learns for long
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train test test-slow clean

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

clean:
	rm -rf .venv runs mlruns mlflow.db*
