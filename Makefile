# Everything a newcomer needs: `make demo`, then `make test`.

PYTHON ?= python3
BIN := .venv/bin
# A folder of its own for each run: what an aborted one left (mounts, say) is nobody else's trouble.
PYTEST := scratch=$$(mktemp -d) && $(BIN)/python -W error -m pytest --basetemp=$$scratch/t
CLEAN_UP := && rm -rf $$scratch
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test slow lint types docs check bench clean

demo: .venv/installed
	$(BIN)/bcseg-batch process-dir samples demo-out --report
	@echo
	@echo "Open demo-out/report/index.html in a browser; the pictures are in demo-out/composites."

test: .venv/installed-test
	$(PYTEST) -m "not slow" $(CLEAN_UP)

# Real parts and long runs: kill loops, small file systems, systemd.
slow: .venv/installed-test
	$(PYTEST) -m slow $(CLEAN_UP)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation as pages, in site/.
docs: .venv/installed-test
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

types: .venv/installed-test
	$(BIN)/mypy

# What CI runs, but for the installation of system packages.
check: test lint types docs slow

# Long, on a machine that does nothing else; docs/performance.md says how to read it.
bench: .venv/installed-bench
	mkdir -p bench-out
	for name in startup stages throughput scaling; do \
	  $(BIN)/python benchmarks/$$name.py --json bench-out/$$name.json || exit 1; done

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "bcseg-batch needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml
	$(PIP) --editable '.[openvino,report,show]'
	@touch $@

.venv/installed-test: .venv/python pyproject.toml
	$(PIP) --editable '.[test]'
	@touch $@ .venv/installed

.venv/installed-bench: .venv/python pyproject.toml
	$(PIP) --editable '.[bench]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv site demo-out bench-out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
