# Everything a checkout needs; `make` alone lists the targets.
# VENV, PYTHON and TORCH_INDEX can be set: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name))))
TORCH_INDEX ?=
SEED ?= 1
JOBS ?= 2000
MINUTES ?= 30
EXAMPLES ?= 5000
PROCESSES ?= 7
MODULES ?=
LOWEST := .venv-lowest
BIN := $(VENV)/bin
STAMP := $(VENV)/rerankq-installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test tests test-lowest lint format docs bench chaos differential stateful clients soak mutate audit clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## Make .venv with everything in it; nothing to do while pyproject.toml and constraints.txt stay.

demo: $(STAMP)  ## Rank a few queries with the bundled model, and show what moved and why.
	$(BIN)/rerankq demo

test: $(STAMP)  ## Lint, check types, run every test, seven files at a time (PROCESSES=7): much of it is waiting.
	@$(MAKE) --no-print-directory --jobs 2 lint tests

tests: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Old libraries warn of what their successors dropped: here a warning is no error.
test-lowest: $(LOWEST)/rerankq-installed  ## Run demo, command line and both packages' tests with the lowest versions allowed.
	$(LOWEST)/bin/rerankq demo
	$(LOWEST)/bin/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -W default tests/producer tests/worker

lint: $(STAMP)  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Put the code into the agreed form.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Fill the tables of docs/ from the models, errors and catalogues that they describe.
	$(BIN)/python docs/generate.py

bench: $(STAMP)  ## Run the benchmarks within 20 minutes, and tell which numbers are reached; INFINITY names a rival's .venv.
	@$(BIN)/python benchmarks/every.py $(if $(INFINITY),--infinity $(INFINITY))

chaos: $(STAMP)  ## Kill, hang and cut what runs 2000 jobs (SEED=1 JOBS=2000), and hold every answer against the promise.
	$(BIN)/python tests/chaos/chaos.py --seed $(SEED) --jobs $(JOBS)
	$(BIN)/python tests/chaos/chaos.py --seed $(SEED) --jobs $(JOBS) --sentinel

differential: $(STAMP)  ## Hold scores against sentence-transformers' predict, every family and runtime (MINUTES=30 SEED=1).
	$(BIN)/python tests/worker/differential.py --minutes $(MINUTES) --seed $(SEED)

stateful: $(STAMP)  ## Compare the ledger with its plain model over EXAMPLES=5000 sequences of calls; make test tries 60.
	STATEFUL_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest tests/producer/test_ledger_twin.py

clients: $(STAMP)  ## Run the clients that people have (Cohere's, LiteLLM, LangChain …) against a live gateway; needs a network once.
	$(BIN)/python tests/clients/run.py

soak: $(STAMP)  ## See whether memory, threads, connections and open files stay flat (MINUTES=30).
	$(BIN)/python tests/chaos/soak.py --minutes $(MINUTES)

mutate: $(STAMP)  ## Put faults into the pure modules, one at a time, and name those that no test notices (MODULES=fusion/ranks).
	$(BIN)/python tests/mutation.py $(MODULES)

audit: $(STAMP)  ## Look for known weaknesses in what constraints.txt pins; needs a network, and fetches pip-audit.
	$(PIP) pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean:  ## Remove the environments and what the tools left.
	rm -rf $(VENV) $(LOWEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .mutate

# The stamp comes last: an interrupted installation is started again. torch comes before all that needs it, alone, so
# that TORCH_INDEX decides which build of it there will be.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (once; this can take some minutes)"
	$(if $(PYTHON),,$(error Python 3.11 or newer is needed; set PYTHON to its path))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON to its path")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable '.[all]' --group dev --group frameworks
	@touch $@

# torch apart, as above: its lowest version would be another build. The tools that run the tests are as new as they come.
$(LOWEST)/rerankq-installed: pyproject.toml constraints.txt $(STAMP)
	@echo "Installing the lowest versions into $(LOWEST) (once; this can take some minutes)"
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@grep '^torch==' constraints.txt > $(LOWEST)/torch.txt
	@$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --override $(LOWEST)/torch.txt \
	  --resolution lowest-direct --editable '.[all]'
	@$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --override $(LOWEST)/torch.txt --group dev
	@touch $@
