# make demo, make test, make test-all, make lint, make docs: each sets up .venv first, if need be.
# PYTHON=<interpreter> uses that environment as it is and installs nothing.

.PHONY: demo test test-all lint format docs setup
.DEFAULT_GOAL := test

ifdef PYTHON
export PYTHONPATH := $(CURDIR)/projects/SAMDETR:$(PYTHONPATH)
RUN := $(PYTHON)
setup: ;
else
RUN := .venv/bin/python
setup:
	@python3 tools/install.py
endif

demo: setup
	$(RUN) tools/demo.py

PARALLEL = $$($(RUN) -c "import xdist" 2>/dev/null && echo --numprocesses auto --maxprocesses 4 --dist worksteal)

test: lint
	$(RUN) -m pytest $(PARALLEL) -m "not thorough"

test-all: lint
	$(RUN) -m pytest $(PARALLEL)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: setup
	$(RUN) -m mkdocs build --strict
