# Each target makes .venv, installs what it needs for this machine, and does its job; a second call
# installs nothing again. PYTHON chooses the interpreter, VENV the environment's folder, and ACCEL
# (cpu, cuda or tpu) overrides what the machine is seen to have.

PYTHON ?= python3
VENV ?= .venv
ACCEL ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)

REQUIREMENTS_cpu := requirements.txt
REQUIREMENTS_cuda := requirements-cuda.txt
REQUIREMENTS_tpu := requirements-tpu.txt
REQUIREMENTS := $(REQUIREMENTS_$(ACCEL))
ifeq ($(REQUIREMENTS),)
$(error ACCEL is '$(ACCEL)'; choose cpu, cuda or tpu)
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN_STAMP := $(VENV)/.run-$(ACCEL)
DEV_STAMP := $(VENV)/.dev-$(ACCEL)
ORACLES_STAMP := $(VENV)/.oracles-$(ACCEL)
# More processes than this gain nothing: each test compiles on several threads.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: setup sample test test-slow test-oracles lint format bench clean

setup: $(RUN_STAMP)

sample: $(RUN_STAMP)
	$(BIN)/python -m hfjax.sample --preview $(ARGS)

test: $(DEV_STAMP)
	$(PYTEST) $(ARGS)

test-slow: $(DEV_STAMP)
	$(PYTEST) -m slow $(ARGS)

test-oracles: $(ORACLES_STAMP)
	$(PYTEST) tests/oracles $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUN_STAMP)
	$(BIN)/python tools/benchmark.py $(ARGS)

clean:
	rm -rf $(VENV)

# An environment of another interpreter than the one that is asked for is refused, not used.
ifeq ($(origin PYTHON),command line)
ifneq ($(wildcard $(BIN)/python),)
ASKED := $(shell $(PYTHON) -c 'import sys; print(sys.version_info[:2])' 2>&1)
THERE := $(shell $(BIN)/python -c 'import sys; print(sys.version_info[:2])' 2>&1)
ifneq ($(ASKED),$(THERE))
$(error $(VENV) was made by another Python than $(PYTHON); add VENV=DIR for a second one, or call make clean first)
endif
endif
endif

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hfjax needs Python 3.11 or newer, and '$(PYTHON)' is not; call make PYTHON=python3.12, say." >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): $(REQUIREMENTS) requirements.txt | $(BIN)/python
	$(PIP) -r $(REQUIREMENTS)
	@touch $@

$(DEV_STAMP): requirements-dev.txt $(RUN_STAMP)
	$(PIP) -r $(REQUIREMENTS) -r requirements-dev.txt
	@touch $@

$(ORACLES_STAMP): requirements-oracles.txt $(DEV_STAMP)
	$(PIP) -r $(REQUIREMENTS) -r requirements-dev.txt -r requirements-oracles.txt
	@touch $@
