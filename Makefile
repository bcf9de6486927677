# Every target creates .venv first, if it does not exist or is older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests start hundreds of processes, each of which would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE
PACKAGES := configs sharding encoders training eval slurm movienet_stream
CODE := $(PACKAGES) tests docs

WORKERS ?= 2
RANKS ?= 1
LAUNCH := $(BIN)/accelerate-launch --config_file configs/accelerate/cpu-2.yaml --num_processes $(RANKS) --module
RUN := $(if $(filter 1,$(RANKS)),$(BIN)/python -m,$(LAUNCH))

PIP := $(BIN)/python -m pip --disable-pip-version-check
WHEEL := dist/movienet_stream-*.whl
NEWEST := build/newest
LOWEST := build/lowest
TESTED_WITH_LOWEST := tests/configs/test_load.py tests/configs/runtime/test_cli.py \
	tests/sharding/test_shard.py tests/encoders/test_decode.py tests/training/test_models.py \
	tests/eval/test_render.py
SITE_PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

.PHONY: demo test test-others test-cluster fast lint docs wheel installed lowest interpreters fix gpu-check golden bench soak rehearsal clean
.DEFAULT_GOAL := demo

$(VENV)/ready: pyproject.toml setup.py encoders/resize.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[dev]"
	@touch $@

demo: $(VENV)/ready  ## All stages on the mini dump, on a CPU; RANKS=2 for two ranks
	$(BIN)/python -m sharding demo --config configs/demo.yaml
	$(BIN)/python -m sharding build --config configs/demo.yaml
	$(RUN) encoders run --config configs/demo.yaml
	$(RUN) training run --config configs/demo.yaml
	$(BIN)/python -m eval report --config configs/demo.yaml

# The tests on a cluster wait more than they compute, so they run at the same time as the others.
# Their second worker has a cluster of its own.
test: $(VENV)/ready  ## All tests; WORKERS=1 for one process
ifeq ($(WORKERS),1)
	$(BIN)/python -m pytest
else
	@$(MAKE) --no-print-directory -j2 test-others test-cluster
endif

test-others: $(VENV)/ready  ## Tests that need no cluster
	$(BIN)/python -m pytest -m "not slurm" -n $(WORKERS) --dist loadfile

test-cluster: $(VENV)/ready  ## Tests on a Slurm cluster; printed at their end
	@mkdir -p build
	@$(BIN)/python -m pytest -m slurm tests/slurm -n 2 --dist worksteal >build/cluster.log 2>&1; \
	status=$$?; cat build/cluster.log; exit $$status

# About two of three tests. The others start processes or servers, train, or build large sets.
# Properties are tested on 20 examples instead of 100.
fast: $(VENV)/ready  ## Tests without those marked slow or real
	HYPOTHESIS_EXAMPLES=20 $(BIN)/python -m pytest -m "not slow and not real and not slurm" \
		$(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile)

lint: $(VENV)/ready  ## Format, lint, types, import contracts
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/mypy docs
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

# Links to pages, sections and files of the repository are checked. External ones are not fetched.
docs: $(VENV)/ready  ## Documentation site in build/docs; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -n -q -c docs -d build/doctrees . build/docs

# Of a copy: setuptools writes next to pyproject.toml, where tests read the metadata meanwhile.
wheel: $(VENV)/ready  ## dist/movienet_stream-VERSION-….whl, with the compiled part if there is a compiler
	rm -rf build/source $(WHEEL)
	mkdir -p build/source
	cp -r pyproject.toml setup.py README.md LICENSE NOTICE THIRD-PARTY.md $(PACKAGES) build/source
	$(PIP) wheel -q --no-deps -w dist build/source

# A virtual environment with the wheel, which finds libraries in .venv but not this checkout: Python
# does not follow the path files there, and the editable installation is one.
define install_wheel
	$(BIN)/python -m venv --clear --without-pip $(1)
	$(BIN)/python $(SITE_PACKAGES) > "$$($(1)/bin/python $(SITE_PACKAGES))/venv.pth"
	$(PIP) --python $(1)/bin/python install -q --ignore-installed --no-deps $(WHEEL)
endef

installed: wheel  ## The demo with the installed wheel and the newest libraries
	$(call install_wheel,$(NEWEST))
	tests/packaging/demo.sh $(NEWEST)/bin

# Types are checked with the lowest numpy only: older releases of some libraries declare fewer types.
lowest: wheel  ## Types, the demo and some tests with the lowest versions that pyproject.toml allows
	$(call install_wheel,$(LOWEST))
	$(PIP) --python $(LOWEST)/bin/python install -q --no-deps \
		$$($(BIN)/python tests/packaging/lowest.py | grep -o 'numpy==[0-9.]*')
	$(BIN)/mypy --python-executable $(LOWEST)/bin/python --cache-dir $(LOWEST)/mypy
	$(PIP) --python $(LOWEST)/bin/python install -q --no-deps \
		$$($(BIN)/python tests/packaging/lowest.py)
	tests/packaging/demo.sh $(LOWEST)/bin
	$(LOWEST)/bin/python -m pytest -q -p no:cacheprovider -W default $(TESTED_WITH_LOWEST)

interpreters: wheel  ## The stages without torch on the other interpreters of this machine
	tests/packaging/interpreters.sh $(WHEEL)

fix: $(VENV)/ready  ## Format, and fix what ruff can fix
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

gpu-check: $(VENV)/ready  ## What only a GPU can prove, as a table
	$(BIN)/python tests/bench/gpu_check.py

golden: $(VENV)/ready  ## Rewrite the golden files; review the diff before committing it
	MOVIENET_WRITE_GOLDEN=1 $(BIN)/python -m pytest -q -k golden

bench: $(VENV)/ready  ## All benchmarks in sequence; figures are written to build/bench
	@mkdir -p build/bench
	for file in tests/bench/bench_*.py; do \
		$(BIN)/python $$file $(BENCH) --json build/bench/$$(basename $$file .py).json || exit 1; done

soak: $(VENV)/ready  ## The loader for 30 minutes over a failing HTTP server; SOAK="--minutes 5" for less
	$(BIN)/python tests/bench/soak_loader.py --json build/bench/soak_loader.json $(SOAK)

rehearsal: $(VENV)/ready  ## 110 films and 480,000 images through all stages, disturbed; a rerun resumes
	$(BIN)/python tests/rehearsal $(REHEARSAL)

clean:  ## Remove the demo's data
	rm -rf demo-data

# Searches only: a file that it finds becomes an example in tests/hostile.
.PHONY: fuzz
fuzz: $(VENV)/ready  ## Hostile files for each parser, MINUTES=1 each; ONLY=tar for some of them
	FUZZ_MINUTES=$(or $(MINUTES),1) $(BIN)/python -m pytest -q --timeout 0 tests/hostile/test_fuzz.py \
		$(if $(ONLY),-k "$(ONLY)")
