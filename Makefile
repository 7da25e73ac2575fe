# `make demo` and `make test` do all their set-up themselves, in .venv inside this checkout, and reuse it when run again.
PYTHON ?= python3
TORCH  ?= torch>=2.11,<2.14
VENV   := .venv
BIN    := $(VENV)/bin
KERNELS := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h csrc/*/*.h)
DEMO   := runs/demo
# A process for each core, one thread in each: most of the time goes into Triton's interpreter, which has one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-all lint contract bench docs clean

demo: $(VENV)/.installed
	$(BIN)/kdtrain compare --recipe demo --methods facd --out $(DEMO)

test: $(VENV)/.installed
	$(PYTEST)

test-all: $(VENV)/.installed
	$(PYTEST) --slow

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
