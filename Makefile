# Needs python3 (3.10 or newer) and make; everything else goes into .venv.
#   make search BUDGET=40% ARGS="--seed 1"
#   make test PYTEST_ARGS="-x tests/test_layering.py"

PYTHON ?= python3
VENV ?= .venv
BUDGET ?= 25%
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
# Three layers and images of 8 pixels, as the digits are: a first run is over in a minute or two.
SEARCH_FLAGS = --supernet toy --width-mult 4 --img-size 8 --budget $(BUDGET) --search-epochs 12 --epochs 12 $(ARGS)

PY = $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help search test test-slow test-faults lint format check wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

search: $(VENV)/.installed  ## set up, then search on the embedded data (BUDGET, ARGS)
	$(PY) tools/search.py $(SEARCH_FLAGS)

# Several run at once: threads that wait are to let others run.
test test-slow test-faults: export OMP_WAIT_POLICY ?= PASSIVE
test: $(VENV)/.installed  ## set up, then run the tests of a few seconds each: before every commit (PYTEST_ARGS)
	$(PY) -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/.installed  ## the tests that `make test` leaves out, but for the long faults
	$(PY) -m pytest -m "slow and not faults" $(PYTEST_ARGS)

test-faults: $(VENV)/.installed  ## the long form of tests/faults: kills at random moments, fuzzing, a soak
	$(PY) -m pytest -m "faults or not faults" tests/faults $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev  ## let ruff sort the imports and format
	$(PY) -m ruff check --select I --fix .
	$(PY) -m ruff format .

check: lint test  ## lint, then test

wheel: $(VENV)/.installed-dev  ## build the wheel into dist/
	$(PY) -m build --wheel

clean:  ## remove build products and caches; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamps are touched last: an interrupted installation is taken up again by the next make.
$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -e '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PY) -m pip install -e '.[dev]'
	touch $@
