# `make demo` and `make test` start from a clean clone; everything they need goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check screenshots install clean

install: $(STAMP)

# torch first and exactly so: a CPU build where there is one, and nothing after it asks for another
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Zeroout needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/zeroout run --out runs/demo

# The rooms without Ray by two processes; the rest one after the other, as each of it starts processes of its own.
test: install
	$(BIN)/python -m pytest -n 2 tests/env tests/agents tests/learner
	$(BIN)/python -m pytest tests/actors tests/deploy tests/test_*.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

# docs/*.png again; needs Debian's chromium, chromium-driver and prometheus
screenshots: install
	PYTHONPATH=.:tests/support $(BIN)/python docs/screenshots.py

clean:
	rm -rf $(VENV) runs
