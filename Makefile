# make quickstart   trains the quickstart model and its dense twin (about ten minutes on two cores;
#                   PRESET=smoke: one minute)
# make test         lint, types and the quick tests (PYTHON=python3.13 for another interpreter)
# make test-all     the slow tests as well

PYTHON ?= python3
# Another interpreter gets an environment of its own.
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
RUNS ?= runs
PRESET ?=

.PHONY: quickstart test test-all lint clean

# One stamp a set of dependencies: installed again only when setup.py changes.
$(VENV)/.core: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

quickstart: $(VENV)/.core
	$(BIN)/python -m moe_jax.train --config=configs/quickstart.py:$(PRESET) --workdir=$(RUNS)/quickstart
	$(BIN)/python -m moe_jax.train --config=configs/quickstart.py:dense,$(PRESET) --workdir=$(RUNS)/quickstart_dense

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf .venv* .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
