# make demo      set up, and run the whole path on the bundled checkpoint
# make test      set up, and run the fast tests: some minutes
# make smoke     set up, and run the few tests that every set of versions must pass
# make thorough  set up, with torch too, and run all tests and the measurement of memory: hours; docs/testing.md says when
# make lint      set up, and check style and types
# make docs      set up, and build the documentation into docs/_build/html
#
# PYTHON=python3.12 chooses the interpreter, VENV=dir the environment, PINS="jax==0.11.2 ..." holds versions down,
# EXTRAS=dev,parity adds torch, with which the models are compared, TESTS="file ..." runs some tests, JOBS=0 one at a time.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
PINS ?=
JOBS ?= auto
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test smoke thorough everything memory lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.run
	rm -rf fqjax-demo
	$(BIN)/fqjax demo --out fqjax-demo

test: $(VENV)/.$(EXTRAS)
	$(PYTEST) $(TESTS)

smoke: $(VENV)/.$(EXTRAS)
	$(PYTEST) -m "smoke and not thorough" $(TESTS)

# Memory is measured without torch, which transformers would import.
thorough:
	$(MAKE) everything VENV=$(VENV)-parity EXTRAS=dev,parity
	$(MAKE) memory

everything: $(VENV)/.$(EXTRAS)
	$(PYTEST) -m "" $(TESTS)

memory: $(VENV)/.$(EXTRAS)
	FQJAX_MEASURE_MEMORY=yes $(BIN)/python -m pytest -m "" tests/convert/test_conversion_memory.py

lint: $(VENV)/.$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	@echo "Setting up $(VENV) ..."
	$(PIP) --editable . $(PINS)
	touch $@

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	@echo "Setting up $(VENV) with the extras $* ..."
	$(PIP) --editable ".[$*]" $(PINS)
	touch $@

clean:
	rm -rf .venv* fqjax-demo docs/_build .pytest_cache .ruff_cache .hypothesis
