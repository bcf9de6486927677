# Every target brings up .venv by itself; it is made once and reused.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := configs sharding encoders training eval slurm
CODE := $(ROOMS) tests

.PHONY: demo test fast lint fix golden clean
.DEFAULT_GOAL := demo

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[dev]"
	@touch $@

demo: $(VENV)/ready  ## The mini dump through all rooms on a CPU
	@PATH="$(CURDIR)/$(BIN):$$PATH" ./configs/demo.sh

test: $(VENV)/ready  ## Every test
	$(BIN)/python -m pytest

fast: $(VENV)/ready  ## The unit tests alone, under a minute
	$(BIN)/python -m pytest -m "not slow and not real"

lint: $(VENV)/ready  ## Format, lint, types, import contracts
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/lint-imports

fix: $(VENV)/ready  ## Format and repair what can be repaired
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

golden: $(VENV)/ready  ## Write the golden files anew; read the diff before committing it
	MOVIENET_WRITE_GOLDEN=1 $(BIN)/python -m pytest -q -k golden

clean:  ## Remove what the demo made
	rm -rf demo-data
