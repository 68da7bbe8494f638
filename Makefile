PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: environment demo test test-all lint

environment: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	$(BIN)/pip install --quiet -e '.[compile,dev]'
	touch $@

test: environment lint
	$(BIN)/pytest -n 2 -m 'not slow' -q

test-all: environment lint
	$(BIN)/pytest -n 2 -q

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
