# Two commands do everything: `make demo` shows hubpeer, `make test` runs all tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is compiled when a module is first imported: most of what PyTorch brings never is.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test check schemas bench train clean

demo: $(VENV)/.hub
	@$(BIN)/hubpeer demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m hubpeer.contract --check
	$(BIN)/python -m pytest -q tests/unit/test_layers.py

schemas: $(VENV)/.hub
	$(BIN)/python -m hubpeer.contract

bench: $(VENV)/.test
	$(BIN)/python -m bench

# The built-in encoder, from training/data to hubpeer/encoder; TEACHER is a folder with all-MiniLM-L6-v2. See training/README.md.
TEACHER ?= build/all-MiniLM-L6-v2

train: $(VENV)/.test
	MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 OMP_WAIT_POLICY=PASSIVE \
		nice $(BIN)/python -m training --teacher $(TEACHER)

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Each install leaves a mark that is older than what it was made from when that changes.
$(VENV)/.hub: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hubpeer[hub] into $(VENV) ..."
	@$(PIP) -e '.[hub]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing hubpeer[hub,llm,pdf,test,check] into $(VENV) ..."
	@$(PIP) -e '.[hub,llm,pdf,test,check]'
	@touch $(VENV)/.hub $@
