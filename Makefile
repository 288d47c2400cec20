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

# What needs nothing but CPU, by two processes; the rest one after the other, as it starts processes of its own.
PLAIN := tests/env tests/agents tests/learner tests/test_benchmark_pages.py tests/test_quantization.py $(addprefix tests/deploy/test_, \
	agreement.py compare.py description.py export.py export_table.py formats.py latency.py limit.py prepare.py prune.py \
	quantize.py recover.py replace.py report.py transfer.py)
test: install
	$(BIN)/python -m pytest -n 2 $(PLAIN)
	$(BIN)/python -m pytest tests $(addprefix --ignore=,$(PLAIN))

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
