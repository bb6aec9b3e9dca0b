# make demo, make test, make lint: each sets up .venv first, if need be.
# PYTHON=<interpreter> uses that environment as it is and installs nothing.

.PHONY: demo test lint format setup
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

test: lint
	$(RUN) -m pytest $$($(RUN) -c "import xdist" 2>/dev/null && echo --numprocesses auto --maxprocesses 4 --dist worksteal)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
