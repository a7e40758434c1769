# Two commands for a fresh machine: `make run` serves the default model, `make test` passes the tests.
# Needs: Python 3.11 with venv, make, gcc, g++, git; for test weights npm.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED := $(VENV)/share/slm-edge/seed
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKS := images/locks
SEED_MODELS := smollm2:135m-instruct minilm:l6-v2
STAMPS := $(VENV)/.stamps
# pip's own progress, without the lines about requirements that are there already
QUIET := 2>&1 | grep -v -e 'already satisfied' -e '^WARNING: Location' || true

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run test lint bench soak images-test compatibility clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

$(STAMPS)/venv:
	@echo "==> Making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) && mkdir -p $(STAMPS) && touch $@

$(STAMPS)/project: pyproject.toml $(STAMPS)/venv
	@$(PIP) install --quiet --no-deps --editable . 2>&1 | grep -v '^WARNING: Location' || true
	@test -x $(BIN)/edge && touch $@

$(STAMPS)/workstation: $(LOCKS)/workstation.txt $(STAMPS)/venv
	@echo "==> Installing what the appliance needs (llama.cpp is compiled: about 4 minutes on two cores, once)"
	@$(PIP) install --no-deps --require-hashes --progress-bar off -r $< > $(VENV)/install.log 2>&1 & pid=$$!; \
	  while kill -0 $$pid 2>/dev/null; do sleep 3; [ -t 1 ] && printf '\r    %s s  %.60s' "$$(ps -o etimes= -p $$pid 2>/dev/null | tr -d ' ')" "$$(tail -n 1 $(VENV)/install.log)        " ; done; \
	  wait $$pid || { tail -n 30 $(VENV)/install.log; exit 1; }
	@echo "    done"; touch $@

$(STAMPS)/dev: $(LOCKS)/dev.txt $(STAMPS)/workstation
	@echo "==> Installing the tools of the tests"
	@$(PIP) install --quiet --no-deps --require-hashes -r $< $(QUIET)
	@touch $@

$(STAMPS)/seed: Makefile edge/store/catalog.toml $(STAMPS)/project $(STAMPS)/workstation
	@echo "==> Fetching the models that every empty store begins with: $(SEED_MODELS)"
	@for model in $(SEED_MODELS); do $(BIN)/edge pull $$model --store $(SEED) || exit 1; done
	@touch $@

setup: $(STAMPS)/workstation $(STAMPS)/project $(STAMPS)/seed  ## Set up everything in .venv, once.
	@$(BIN)/python -m compileall -q edge quantize runtime tui

setup-dev: $(STAMPS)/dev setup

run: setup  ## Set up, and serve the default model on http://127.0.0.1:8080.
	@$(BIN)/edge serve

test: setup-dev  ## Set up, and pass the tests.
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup-dev  ## Style, types and the import contract.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports

bench: setup-dev  ## Side by side with llama.cpp's own server.
	@$(BIN)/python -m benchmarks.serve

soak: setup-dev  ## The long runs.
	@$(BIN)/python -m pytest -m soak --timeout 7200

images-test: setup-dev  ## Build the images and run them (needs buildah and podman).
	@$(BIN)/python -m pytest -m images --timeout 7200

compatibility: setup-dev  ## Write docs/compatibility.md anew.
	@$(BIN)/python -m tests.compatibility > docs/compatibility.new && mv docs/compatibility.new docs/compatibility.md

clean:  ## Remove what set-up made.
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
