# Every target brings up .venv by itself; it is made once and reused.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := configs sharding encoders training eval slurm movienet_stream
CODE := $(PACKAGES) tests

WORKERS ?= 1
RANKS ?= 1
LAUNCH := $(BIN)/accelerate launch --config_file configs/accelerate/cpu-2.yaml --num_processes $(RANKS) --module
RUN := $(if $(filter 1,$(RANKS)),$(BIN)/python -m,$(LAUNCH))

.PHONY: demo test fast lint fix golden bench clean
.DEFAULT_GOAL := demo

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[dev]"
	@touch $@

demo: $(VENV)/ready  ## The mini dump through all rooms on a CPU; RANKS=2 for two ranks
	$(BIN)/python -m sharding demo --config configs/demo.yaml
	$(BIN)/python -m sharding build --config configs/demo.yaml
	$(RUN) encoders run --config configs/demo.yaml
	$(RUN) training run --config configs/demo.yaml
	$(BIN)/python -m eval report --config configs/demo.yaml

test: $(VENV)/ready  ## Every test; WORKERS=2 for two at a time
	$(BIN)/python -m pytest $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile)

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

bench: $(VENV)/ready  ## Every benchmark in turn; figures go to build/bench
	@mkdir -p build/bench
	for file in tests/bench/bench_*.py; do \
		$(BIN)/python $$file $(BENCH) --json build/bench/$$(basename $$file .py).json || exit 1; done

clean:  ## Remove what the demo made
	rm -rf demo-data
