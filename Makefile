# The project's commands. Each installs its dependencies first, if they are missing.
#   make setup      a .venv with the core, versions pinned by constraints.txt (TORCH_INDEX=URL chooses a
#                   build of torch, PYTHON=python3.12 a Python)
#   make setup-X    the core and an extra: eval, bench, deepspeed, search, tensorboard, wandb, ui; test for all of
#                   them and the test tools
#   make train      the main job: three minutes of training on two cores, into runs/quickstart/
#   make ui         MLflow's interface on the database that the runs wrote (RUNS=FOLDER for others than runs/)
#   make bench      minrnn bench with all peers (BENCH="train --lengths 512" for another than the scan)
#   make test       lint, types and tests, a few minutes
#   make test-slow  what launches many processes or learns for long
#   make sweep-demo  train the sweep launch/sweeps/demo.yaml with two workers, and fit its scaling laws
#   make soak       half an hour of random faults against an undisturbed run (MINUTES=5 for less)
#   make test-transformers  transformers' own model tests, from its source distribution (a download), on our
#                   models and on three of its own
#   make docs       write the generated parts of README.md and docs/ anew
#   make test-multihost  two hosts made of network namespaces, as root; one is lost in the middle of a run
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	--constraint constraints.txt
UNFINISHED := .venv/.unfinished

# pip accepts a partly installed package as installed, and one build of torch for another. So the .venv is
# made from nothing after an interrupted installation, and for another TORCH_INDEX.
RESTART := $(if $(wildcard $(UNFINISHED)),from-nothing)
ifdef TORCH_INDEX
ifneq ($(TORCH_INDEX),$(shell cat .venv/.torch-index 2> /dev/null))
RESTART := from-nothing
endif
endif

.PHONY: setup setup-eval setup-bench setup-deepspeed setup-search setup-test train bench test test-slow test-multihost
.PHONY: test-transformers sweep-demo soak docs ui setup-tensorboard setup-wandb setup-ui clean from-nothing

setup: .venv/.ready
setup-eval setup-bench setup-deepspeed setup-search setup-tensorboard setup-wandb setup-ui setup-test: \
setup-%: .venv/.ready-%

define CHECK_PYTHON
import sys
version = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    sys.exit("error: PYTHON: $(PYTHON) is Python " + version
             + "; install 3.11 or newer and name it: make setup PYTHON=python3.11")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("error: PYTHON: $(PYTHON) has no venv or ensurepip; install them "
             + "(Debian and Ubuntu: apt install python" + version + "-venv)")
endef
export CHECK_PYTHON

# Byte code is compiled for the imports of the main job only (pip: --no-compile). Compiling all of torch takes
# longer than everything else.
.venv/.ready: pyproject.toml constraints.txt $(RESTART)
	@command -v $(PYTHON) > /dev/null || \
		{ echo 'error: PYTHON: there is no $(PYTHON); install Python 3.11 or newer' >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(if $(RESTART),rm -rf .venv)
	mkdir -p .venv && touch $(UNFINISHED)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) --no-deps torch)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools
	$(PIP) --no-build-isolation --editable .
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -c \
		'import alembic, datasets, matplotlib.pyplot, mlflow, sqlalchemy, minrnn.pipeline.loop'
	$(if $(TORCH_INDEX),echo '$(TORCH_INDEX)' > .venv/.torch-index)
	rm $(UNFINISHED)
	touch $@

.venv/.ready-test: EXTRAS := bench,deepspeed,eval,search,tensorboard,wandb,ui,test
.venv/.ready-%: EXTRAS = $*
.venv/.ready-%: .venv/.ready
	touch $(UNFINISHED)
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	# Some packages contain files for other versions of Python, which fail to compile.
	$(BIN)/python -m compileall -q -j 0 .venv/lib > /dev/null || true
	rm $(UNFINISHED)
	touch $@

ui: .venv/.ready-ui
	$(BIN)/minrnn ui $(or $(RUNS),runs)

train: .venv/.ready
	$(BIN)/minrnn train --config quickstart

bench: .venv/.ready-bench
	$(BIN)/minrnn bench $(or $(BENCH),scan)

test: .venv/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: .venv/.ready-test
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m slow

sweep-demo: .venv/.ready-eval
	$(BIN)/minrnn sweep demo --workers 2
	$(BIN)/minrnn fit runs/sweep-demo

soak: .venv/.ready-test
	$(BIN)/python tests/soak --minutes $(or $(MINUTES),30)

test-multihost: .venv/.ready-test
	$(BIN)/python -m pytest -q tests/multihost

test-transformers: .venv/.ready-test
	$(BIN)/python -m pip install --quiet parameterized
	mkdir -p .venv/transformers-tests && $(BIN)/python tests/mixins/prepare.py .venv/transformers-tests
	PYTHONPATH=.venv/transformers-tests $(BIN)/python tests/mixins/count.py

docs: .venv/.ready-test
	$(BIN)/minrnn figures docs

clean:
	rm -rf .venv runs mlruns mlflow.db*
