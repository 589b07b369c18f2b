# The two commands are `make demo` and `make test`; both make their own virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.sn29
	$(BIN)/sn29 demo

test: $(VENV)/.sn29-dev
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(VENV)/.sn29-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "sn29 needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

INSTALLING = @echo "Installing sn29 and its libraries into $(VENV): 1.5 GB with the CPU build of torch, several times that with the CUDA build." && \
	echo "It takes two minutes or more, as the line to the package registry is; pip says nothing meanwhile."

$(VENV)/.sn29: pyproject.toml | $(BIN)/python
	$(INSTALLING)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.sn29-dev: pyproject.toml | $(BIN)/python
	$(INSTALLING)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.sn29

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
