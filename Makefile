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

# By two processes, each file in one: what starts Ray or a cluster mostly waits, and the other goes on meanwhile.
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

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
