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

# What starts Ray, a cluster or a browser, one after the other; all else by two processes.
SERIAL := tests/actors/test_ray_metrics.py tests/test_benchmark_search.py tests/test_benchmark_tables.py \
	$(addprefix tests/deploy/test_, campaign.py \
	cli.py cluster.py dashboards.py doctor.py event_files.py launch_files.py ray_address.py report_in_browser.py rllib.py \
	secrets.py status.py storage.py telemetry.py watching.py)
test: install
	$(BIN)/python -m pytest -n 2 tests $(addprefix --ignore=,$(SERIAL))
	$(BIN)/python -m pytest $(SERIAL)

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
