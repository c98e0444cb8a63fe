# Two commands: `make train` and `make test`. Each makes a virtual environment in VENV, installs this
# checkout into it (editable, with the tested versions) and runs. Stamps let a second call start at once.
VENV ?= .venv
# `make lint` and `make types` have a place of their own, because mypy must see an installed wheel.
CHECK_VENV ?= .venv-check
PYTHON ?= python3
ARGS ?=

CODE = agents envs scripts tests textgym
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help train test test-slow lint types
help:
	@echo "make train      train the embedded model (options of textgym train: ARGS='--seed 1')"
	@echo "make test       every test that is neither slow nor for a GPU"
	@echo "make test-slow  the slow tests"
	@echo "make lint       ruff and the import floors"
	@echo "make types      mypy --strict on an installed wheel"

train: $(VENV)/.stamp-run
	$(VENV)/bin/textgym train $(ARGS)

test: $(VENV)/.stamp-test
	$(VENV)/bin/python -m pytest -n 2 $(ARGS)

test-slow: $(VENV)/.stamp-test
	$(VENV)/bin/python -m pytest -n 2 -m "slow and not gpu" $(ARGS)

lint: $(CHECK_VENV)/.stamp-dev
	$(CHECK_VENV)/bin/ruff check $(CODE)
	$(CHECK_VENV)/bin/ruff format --check $(CODE)
	$(CHECK_VENV)/bin/python scripts/check_floors.py

# The wheel is built without the leftovers of an earlier build, and checked from another folder: at the
# root of a checkout mypy would read the working tree, where textgym.envs is not.
types: $(CHECK_VENV)/.stamp-dev
	rm -rf build $(CHECK_VENV)/dist
	$(CHECK_VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(CHECK_VENV)/dist .
	$(CHECK_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall $(CHECK_VENV)/dist/*.whl
	rm -rf build
	cd $(CHECK_VENV) && bin/python -m mypy --config-file $(CURDIR)/pyproject.toml -p textgym

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(CHECK_VENV)/bin/python:
	$(PYTHON) -m venv $(CHECK_VENV)

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.stamp-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[test]'
	@touch $@ $(VENV)/.stamp-run

$(CHECK_VENV)/.stamp-dev: pyproject.toml constraints.txt | $(CHECK_VENV)/bin/python
	$(CHECK_VENV)/bin/python $(PIP_INSTALL) '.[dev]'
	@rm -rf build
	@touch $@
