# Each target makes the environment it needs. PYTHON is the interpreter the environment is made with, VENV where it lies.
# An environment that already has the packages (make test VENV=/path/to/env) is used as it is.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= runs/demo
AGAINST ?= HEAD
GPU_OUTPUT ?= runs/gpu

BIN := $(VENV)/bin
RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python

MODULES_recipes := torch numpy rich torchvision pydantic pydantic_settings safetensors scipy jinja2
MODULES_demo := $(MODULES_recipes) sklearn matplotlib
MODULES_test := $(MODULES_demo) pytest xdist hypothesis packaging torchmetrics timm datasets lightly lightning_fabric cleanlab \
	optuna ruff pyright build setuptools twine check_jsonschema
MODULES_docs := $(MODULES_recipes) sphinx furo myst_parser

.PHONY: help demo test gpu lint docs package soak guard clean environment-demo environment-test environment-docs

help:
	@echo "make demo    run the BiSSL recipe's default preset into $(OUTPUT); a second call resumes it"
	@echo "make test    run the test suite"
	@echo "make gpu     know this machine's GPU: tests on it, speeds and memory, in 8 minutes, into $(GPU_OUTPUT)"
	@echo "make lint    check style, formatting and types"
	@echo "make docs    build the documentation into docs/_build/html"
	@echo "make package try sdist and wheel in fresh environments, look for every page in the documentation, and build dist/"
	@echo "make soak    kill and resume the default preset 20 times, by one process and by two, and compare"
	@echo "make guard   compare the working tree's speed with that of AGAINST, about 5 minutes on two idle cores"
	@echo "make clean   remove caches and build products (not the environment, not runs/)"
	@echo "variables:   PYTHON=$(PYTHON) VENV=$(VENV) OUTPUT=$(OUTPUT) GPU_OUTPUT=$(GPU_OUTPUT) AGAINST=$(AGAINST)"

demo: environment-demo
	$(RUN) recipes/bissl/run.py --output-dir "$(OUTPUT)" --resume

test: environment-test
	$(RUN) -m pytest

gpu: environment-test
	$(RUN) benchmarks/gpu/run.py --json "$(GPU_OUTPUT)/gpu.json" --page "$(GPU_OUTPUT)/gpu.html"

lint: environment-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: environment-docs
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html

package: environment-test environment-docs
	$(RUN) -m pytest -m slow tests/project/test_packaging.py tests/project/test_documentation.py
	rm -rf dist
	$(BIN)/python -P -m build --no-isolation
	$(BIN)/python -P -m twine check --strict dist/*

soak: environment-demo
	$(RUN) benchmarks/soak.py --kills 20 --output benchmarks/results/soak.json
	$(RUN) benchmarks/soak.py --kills 20 --ranks 2 --output benchmarks/results/soak_ranks.json

guard: environment-demo
	$(RUN) benchmarks/guard/run.py --against "$(AGAINST)"

# Without a stamp of our own an environment may still be complete, when somebody else made it: then nothing is installed.
environment-demo environment-test environment-docs: environment-%:
	@if [ ! -e "$(VENV)/.bilevel-$*" ] && $(BIN)/python -P -c 'import sys; from importlib.util import find_spec; sys.exit(any(find_spec(name) is None for name in sys.argv[1:]))' $(MODULES_$*) 2>/dev/null; then \
		echo "using the environment $(VENV) as it is"; \
	else \
		$(MAKE) --no-print-directory "$(VENV)/.bilevel-$*"; \
	fi

$(VENV)/.bilevel-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv "$(VENV)"
	$(BIN)/python -m pip install -e ".[$*]"
	@touch "$@"

clean:
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(wildcard bilevel recipes examples benchmarks tests) -name __pycache__ -type d -prune -exec rm -rf {} +
