# Everything starts here: `make demo` and `make test` each work alone on a fresh clone (Python 3.11 to 3.13).

# .venv, or elsewhere if this clone's path has a blank; the reason stands in the script. Asked once.
ifndef VENV
VENV := $(shell tools/venv_place.sh)
endif
ifeq ($(VENV),)
$(error no place for the virtual environment)
endif
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Found by tools/setup_venv.sh if it isn't named: make PYTHON=/usr/bin/python3.12 ...
export PYTHON
# Another of the releases in tools/releases.toml than the reference: make VLLM_RELEASE=0.31 VENV=.venv-0.31 ...
export VLLM_RELEASE

# make demo DEMO_ARGS=--once
DEMO_ARGS ?=
# make test PYTEST_ARGS="tests/unit -k config"
PYTEST_ARGS ?=
PYTEST := $(PY) -m pytest -m "not gpu and not slow" --timeout 900 --durations 30
# make bench BENCH=tests/bench/bench_row_stats.py (the benchmarks of single kernels need a GPU)
BENCH ?= -m glassbox.cli bench
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format bench soak releases families clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Create the virtual environment (the others do it by themselves)

# Runs once, and again after a change of what is to be installed. The stamp comes last: a broken set-up leaves none.
$(STAMP): pyproject.toml tools/setup_venv.sh tools/install_cpu.sh tools/vllm_metadata.py tools/vllm_releases.py tools/releases.toml
	tools/setup_venv.sh $(VENV)
	@touch $@

demo: $(STAMP)  ## Serve a small real model and show its attention; DEMO_ARGS=--once stops by itself
	@$(VENV)/bin/glassbox demo $(DEMO_ARGS)

# The kernels' tests have processes of their own: Triton's interpreter must be chosen before anything imports Triton.
# A test of these and of the unit tests keeps one core busy, so two go at once, and so do those that run vLLM without its
# servers: each computes on one thread, since two of them with OpenMP's spinning threads are slower than one after the
# other (the kernels' in torch take six times as much processor time). The rest starts servers, which want all cores.
ONE_THREAD := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
IN_PROCESS := tests/families tests/integration tests/releases \
	$(addprefix tests/e2e/,test_attach.py test_bad_config.py test_same_output.py)
# Tests start some hundred processes, which would compile all modules each time where an image forbids to keep bytecode.
test: export PYTHONDONTWRITEBYTECODE :=
test: lint  ## Lint, then run all tests that need neither a GPU nor hours
ifeq ($(PYTEST_ARGS),)
	$(ONE_THREAD) $(PYTEST) -n 2 tests/kernels
	$(ONE_THREAD) $(PYTEST) -n 2 tests/unit
	$(ONE_THREAD) $(PYTEST) -n 2 --dist loadscope $(IN_PROCESS)
	$(PYTEST) $(addprefix --ignore=,tests/kernels tests/unit $(IN_PROCESS))
else
	$(PYTEST) $(PYTEST_ARGS)
endif

lint: $(STAMP)  ## Check style, types, imports between rooms, shell scripts and the Dockerfile
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/glassbox dashboards --check
	$(PY) -m tools.releases_table --check
	$(PY) -m tools.models_table --check
	$(PY) -m tools.signals_table --check
	$(VENV)/bin/shellcheck .ci/run tools/*.sh
	@# hadolint has no package for every platform; where it is missing its absence is said, not hidden.
	@if [ -x $(VENV)/bin/hadolint ]; then $(VENV)/bin/hadolint Dockerfile; else echo "hadolint: not available here"; fi

format: $(STAMP)  ## Format the code and mend what the linter can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)  ## Compare throughput on this CPU with and without glassbox
	$(PY) $(BENCH) $(BENCH_ARGS)

soak: $(STAMP)  ## Run the long form of the tests
	$(PY) -m pytest -m "slow and not gpu and not releases and not families" $(PYTEST_ARGS)

# Reads all supported releases, and runs those whose wheels for CPUs need the installed torch; each is fetched once and
# takes 450 MB in ~/.cache/glassbox (tools/vllm_releases.py remove all).
releases: $(STAMP)  ## Test every supported vLLM release that runs on this CPU, and write the table of them
	$(PY) -m pytest --timeout 900 --durations 30 --record docs/data/releases.json tests/releases $(PYTEST_ARGS); \
	status=$$?; $(PY) -m tools.releases_table && exit $$status

# One thread, as in `make test`: what is compared there must be what is recorded here.
families: $(STAMP)  ## Serve a tiny model of each family of models, and write the table of what is observed of them
	$(ONE_THREAD) $(PY) -m pytest --timeout 900 --durations 30 \
		--record-models docs/data/models.json tests/families $(PYTEST_ARGS); \
	status=$$?; $(PY) -m tools.models_table && exit $$status

clean:  ## Remove the virtual environment and everything that was built (not the model and the vLLM releases in ~/.cache/glassbox)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
