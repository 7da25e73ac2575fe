# `make demo` and `make test` do all their set-up themselves, in .venv inside this checkout, and reuse it when run again.
PYTHON ?= python3
TORCH  ?= torch>=2.11,<2.14
VENV   := .venv
BIN    := $(VENV)/bin
KERNELS := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*/*.h)
DEMO   := runs/demo

.PHONY: demo test test-all lint contract bench docs clean

demo: $(VENV)/.installed
	$(BIN)/kdtrain compare --recipe demo --methods facd --out $(DEMO)

test: $(VENV)/.installed
	$(BIN)/pytest

test-all: $(VENV)/.installed
	$(BIN)/pytest --slow

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

contract: $(VENV)/.installed
	$(BIN)/python -m tests.contract_table

bench: $(VENV)/.installed
	$(BIN)/pytest benchmarks --benchmark-only

docs: $(VENV)/.installed
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

# torch first and bounded: left to itself pip may fetch a newer build with several GB of CUDA packages. An installed torch is kept.
$(VENV)/.installed: pyproject.toml setup.py $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info kdops/*.so kdops/_build.json site
