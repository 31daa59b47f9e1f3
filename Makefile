# make venv | demo [IMAGES=DIR] | test | test-fast (no Ray, processes or learning) | check | fix | lock | faults [NAME=WORD]    TORCH=cpu takes PyTorch's CPU build (needs the internet)
.PHONY: venv demo test test-fast check fix lock faults
.DEFAULT_GOAL := demo
TORCH ?= $(shell cat .venv/torch 2>/dev/null || echo default)
PYTHON ?= python3
BIN := .venv/bin
DONE := .venv/made-$(TORCH)
UV := $(shell command -v uv 2>/dev/null || echo "$(PYTHON) -m uv")
INSTALL := $(UV) pip install --quiet --python $(BIN)/python

venv: $(DONE)

# The lock pins the registry's torch and its twin torchvision together. A CPU build has no CUDA packages,
# so there the lock only constrains what pyproject.toml asks for.
$(DONE): requirements.lock pyproject.toml
	@$(UV) --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet --disable-pip-version-check uv \
		|| $(PYTHON) -m pip install --quiet --user --break-system-packages uv
	@echo "building .venv from requirements.lock (a few minutes the first time, 5 GB with CUDA)"
	@$(UV) venv --quiet --clear --python '>=3.11,<3.14' .venv
	@if [ "$(TORCH)" = cpu ]; then \
		$(INSTALL) --torch-backend=cpu --constraint requirements.lock --requirement pyproject.toml --extra dev; \
	else \
		$(INSTALL) --requirement requirements.lock; \
	fi
	@$(INSTALL) --no-deps --editable .
	@echo $(TORCH) > .venv/torch
	@touch $@

demo: venv
	@$(BIN)/python -m pipeline demo $(if $(IMAGES),--images "$(IMAGES)" --out "runs/demo-$(notdir $(IMAGES:/=))")

test: venv
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: venv
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not slow"

faults: venv
	@$(BIN)/python tests/faults.py --unbroken $(if $(NAME),"$(NAME)")

check: venv
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyrefly check
	@$(BIN)/lint-imports

fix: venv
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock:
	@$(UV) pip compile --quiet --universal --python-version 3.11 --extra dev --no-annotate \
		--custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml
