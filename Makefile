# make demo    teach the demo model a concept it has never seen (a few minutes on a laptop CPU)
# make test    ruff, pyright and pytest, as CI runs them
# Both make .venv on the first run. PYTHON=python3.12 chooses the interpreter, PIP_ARGS="..." is given to pip install.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
DEMO_ARGS ?=
RUN = $(VENV)/bin/python

.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.standalone
	$(RUN) -m dopsd_core demo $(DEMO_ARGS)

test: lint
	$(RUN) -m pytest -q

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit('Python 3.10 to 3.13 is needed, this is %d.%d: make PYTHON=python3.12' % v)"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.standalone: requirements-standalone.txt | $(VENV)/.python
	$(RUN) -m pip install --only-binary=:all: $(PIP_ARGS) -r requirements-standalone.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.standalone
	$(RUN) -m pip install --only-binary=:all: $(PIP_ARGS) -r requirements-dev.txt
	touch $@
