# make quickstart   install into .venv, run the miniature experiment, print its table
# make test         install into .venv, run the test suite
# make soak         the longest of its tests: more kills, more fuzzing; more yet with CQD_LONG=1 and CQD_KILLS=100
# make lint         ruff and mypy
#
# What pip cannot install (bubblewrap; a browser and a database for the tests) is installed with apt where that needs no
# password.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests of one file share what takes long to make.
SPREAD := --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test soak lint sandbox programs
.DEFAULT_GOAL := quickstart

quickstart: sandbox $(VENV)/installed
	$(BIN)/cqd evolve experiments/skills.yaml

test: programs $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses auto $(SPREAD) --durations 10

soak: programs $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses auto $(SPREAD) --durations 10 -m soak

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sandbox:
	@sh .ci/packages bwrap=bubblewrap || { \
	  echo "Models' answers are executed in a sandbox that needs bubblewrap" >&2; exit 1; }

# Tests of what is not there are skipped, with the reason.
programs:
	@sh .ci/packages bwrap=bubblewrap chromium=chromium chromedriver=chromium-driver || true
	@PATH="$$PATH:/usr/sbin" sh .ci/packages mariadbd=mariadb-server-core my_print_defaults=mariadb-client-core || true

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
