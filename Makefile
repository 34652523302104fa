# make quickstart   install into .venv, run the miniature experiment, print its table
# make test         install into .venv, run the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint sandbox
.DEFAULT_GOAL := quickstart

quickstart: sandbox $(VENV)/installed
	$(BIN)/cqd evolve experiments/skills.yaml

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sandbox:
	@command -v bwrap >/dev/null || { \
	  echo "Models' answers are executed in a sandbox that needs bubblewrap; install it with: sudo apt-get install bubblewrap" >&2; \
	  exit 1; }

# Where python3 comes without ensurepip (Debian without python3-venv), virtualenv makes the environment instead.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "cqd_jax needs Python 3.11, 3.12 or 3.13; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  rm -rf $(VENV) && \
	  $(PYTHON) -m pip install --quiet --target .venv-bootstrap virtualenv && \
	  PYTHONPATH=.venv-bootstrap $(PYTHON) -m virtualenv --quiet $(VENV) && \
	  rm -rf .venv-bootstrap; }

$(VENV)/installed: setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing cqd_jax and what it needs into $(VENV): a minute or two"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
