# `make` prints this menu. Everything installs into .venv, once, and again when its inputs change.
#
#   PYTHON=/path/to/python3.11    the Python to build .venv with (3.11 or newer)
#   PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"    torch without CUDA

.POSIX:
.PHONY: menu install demo test test-full check format protos bench soak

PYTHON ?= python3
PIP_FLAGS ?=
TIERS ?= static unit ranks ray faults
MINUTES ?= 30

BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

menu:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'

demo: .venv/.installed  ## train a small GPT-MoE on the bundled poems and stream one over gRPC
	@$(BIN)/gptmoe demo

test: .venv/.installed-dev  ## all tests that need no GPU, tier by tier (TIERS="static unit" for some)
	@$(BIN)/python .ci/tiers.py $(TIERS)

test-full: .venv/.installed-dev  ## the same, then the whole matrix of layouts, the GPU tests and the benches
	@$(BIN)/python .ci/tiers.py $(TIERS) matrix gpu bench

check: .venv/.installed-dev  ## style, types, who imports whom, generated code
	@$(BIN)/python .ci/tiers.py static

bench: .venv/.installed-dev  ## speed and memory; wants the machine for itself
	@$(BIN)/python .ci/tiers.py bench

soak: .venv/.installed-dev  ## kills, cancels, refreshes and scaling under load (MINUTES=30)
	@$(BIN)/python -m tests.soak.soak --minutes $(MINUTES)

format: .venv/.installed-dev  ## bring the code into shape
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

protos: .venv/.installed-dev  ## generate protos/*_pb2* again
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. protos/*.proto
	$(BIN)/python -m grpc_tools.protoc -I. --grpc_python_out=. `grep -l '^service ' protos/*.proto`

install: .venv/.installed  ## only install

.venv/bin/python:
	@for python in $(PYTHON) python3.13 python3.12 python3.11 none; do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	if [ $$python = none ]; then \
	    echo "Python 3.11 or newer is needed, found: `$(PYTHON) --version 2>&1`." >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
	    exit 1; \
	fi; \
	if ! $$python -m venv .venv; then \
	    rm -rf .venv; \
	    echo "$$python cannot make virtual environments; install its venv module" >&2; \
	    echo "(on Debian and Ubuntu: apt install python3-venv)." >&2; \
	    exit 1; \
	fi

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing into .venv: about 2 GB, one to ten minutes ..."
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing what the tests need: about 1 GB ..."
	@$(PIP) -e '.[dev]'
	@touch $@
