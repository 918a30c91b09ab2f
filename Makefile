# Everything here needs a Python of at least 3.10, make, and a package registry that pip can reach; nothing else.
# pip's own settings are honoured (PIP_INDEX_URL, PIP_FIND_LINKS, ...): to get a CPU-only PyTorch, let PIP_FIND_LINKS
# point to a directory that holds its wheel.

VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   set up .venv, then teach a small real model a real task and show what it learned (5 minutes)"
	@echo "make test         set up .venv, then lint, types and all tests (WORKERS=2 processes)"
	@echo "make lint         set up .venv, then ruff and mypy"
	@echo "make clean        remove .venv and everything that tools left here; runs and fetched models stay"
	@echo "PYTHON=python3.12 make ...   takes another Python for a new .venv (3.10 or newer)"

quickstart: $(VENV)/.installed-demo
	@echo "quickstart: fetching a model and data (about 100 MB, once), training for a minute or two, comparing"
	@$(BIN)/automodel quickstart $(ARGS)

test: lint
	@echo "test: running all tests with $(WORKERS) processes"
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-dev
	@echo "lint: ruff check, ruff format --check, mypy (the first time takes a minute)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	@echo "clean: removing $(VENV), caches and build leftovers; runs/, checkpoints/ and fetched models stay"
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Only Hopper needs it (docs/install.md); a machine without a driver says nothing, and gets nothing.
HOPPER = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -q '^9\.' && echo ,hopper)

# One stamp an extra. pip runs in the background so that somebody who watches sees what it is doing. The log is kept.
# PYTHONDONTWRITEBYTECODE is unset: without .pyc files every later start takes twice as long.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setup: installing nemo-automodel[$*$(HOPPER)] into $(VENV) (1 to 3 minutes, about 1.5 GB, dev 2.2 GB; log: $(VENV)/install-$*.log)"
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip > /dev/null 2>&1 || { \
	  echo "setup: $(VENV) has no pip. Run make clean; on Debian or Ubuntu also: apt install python3-venv"; exit 1; }
	@unset PYTHONDONTWRITEBYTECODE; log=$(VENV)/install-$*.log; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	  --editable '.[$*$(HOPPER)]' --constraint constraints.txt > $$log 2>&1 & pid=$$!; \
	trap 'kill $$pid; exit 130' INT TERM; \
	seconds=0; while kill -0 $$pid 2>/dev/null; do \
	  sleep 1; seconds=$$((seconds + 1)); \
	  if [ $$((seconds % 10)) -eq 0 ]; then \
	    echo "setup: $$seconds s, $$(grep -E '^ *(Collecting|Downloading|Installing|Building)' $$log | tail -n 1 | cut -c1-90)"; \
	  fi; \
	done; \
	wait $$pid || { tail -n 15 $$log; echo "setup: pip failed (above, and $$log). Check the network and pip's settings, then run make again."; exit 1; }
	@touch $@
	@echo "setup: done"

# An environment that is there already, made by uv for example, is kept; it only gets the pip it may lack.
$(BIN)/python:
	@echo "setup: making $(VENV)"
	@found=; for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "setup: no Python of at least 3.10 found. Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; \
	fi; \
	$$found -m venv $(VENV) || { \
	  echo "setup: $$found cannot make environments. Install its venv module (Debian, Ubuntu: apt install python3-venv)."; \
	  exit 1; }
