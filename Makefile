# Two commands do everything: `make demo` shows hubpeer, `make test` runs all tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is compiled when a module is first imported: most of what PyTorch brings never is.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test check schemas bench clean

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
