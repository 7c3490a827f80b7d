# One environment below the clone; every target makes it if needed.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest

.PHONY: demo test test-oldest check bench gpu-check clean

demo: .venv/ready
	$(BIN)/fastmoco demo

# `-n auto` counts physical cores: one, on a machine of two hyper-threads.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4

# On the oldest version of every dependency.
test-oldest: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n logical --maxprocesses 4

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python benchmarks/compare.py train

gpu-check: .venv/ready
	PYTHONPATH=. $(BIN)/python benchmarks/gpu_check.py

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,cuda13]'
	touch $@

$(OLDEST)/ready: PYTHON = python3.11
$(OLDEST)/ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	grep -oE '"[a-z0-9-]+>=[^"]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' > $(OLDEST)/floors.txt
	$(OLDEST)/bin/pip install --quiet --editable '.[dev,cuda12]' --constraint $(OLDEST)/floors.txt
	touch $@

clean:
	rm -rf .venv $(OLDEST) demo
