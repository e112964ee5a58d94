# Two commands do everything on a machine with Python 3.11 or newer:
#   make run     the whole pipeline on sample data, with its report
#   make test    the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help run test test-long check docs format schema lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

run: $(VENV)/run.stamp ## draw sample data, train all three phases on it, write the report (6 minutes on 2 cores)
	$(BIN)/python -m pipeline.sample sample --pairs 120 --size 256x128 --seed 0
	$(BIN)/python -m pipeline.run

# Of two at a time on two cores, OpenMP's threads of one must not spin while the other computes.
test: $(VENV)/test.stamp ## the tests, two at a time (12 to 20 minutes on 2 cores, by their kind)
	OMP_WAIT_POLICY=passive $(PYTEST) -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/test.stamp ## what `make test` leaves out: submitted jobs, every recipe, sweeps, killed drivers
	$(PYTEST) -m long

check: $(VENV)/test.stamp ## lint, format, types, import layers, the code's size and shape
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs/hooks.py
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.house

docs: $(VENV)/test.stamp ## the docs as a site, in site/; `.venv/bin/mkdocs serve` shows it while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/test.stamp ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/run.stamp ## the config's JSON schema, for editors
	$(BIN)/python -m pipeline.run --schema > pipeline.schema.json

lock: $(VENV)/test.stamp ## exact versions of everything, from pyproject.toml
	$(BIN)/python -m pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --strip-extras --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --output-file requirements.lock pyproject.toml
	$(BIN)/pip-compile --quiet --strip-extras --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --extra test --constraint requirements.lock --output-file requirements-test.lock pyproject.toml
	sed -i.bak 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock requirements-test.lock && rm -f requirements*.lock.bak

clean: ## remove the environment and what `make run` wrote
	rm -rf $(VENV) workspace sample site

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements.lock | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

$(VENV)/test.stamp: requirements-test.lock | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.lock
	@touch $@ $(VENV)/run.stamp
