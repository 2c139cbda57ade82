# Every target makes what it needs; `make train` and `make test` work on a bare machine with Python >= 3.12.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 python3 python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
REFEREE_PYTHON ?= $(shell for p in python3.11 $(HOME)/.pyenv/versions/3.11*/bin/python; do \
  $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
PART ?= all
.DEFAULT_GOAL := help
.PHONY: help setup train test verify docs referee clean

help:
	@echo "make train     train a small GPT on the Python standard library, evaluate it, sample from it"
	@echo "make test      lint, types, and the test suite"
	@echo "make verify    the long checks: PART=crash|start|quality|learn|invariance|batches|faults|serve|ray|mup|plan|notebooks|all"
	@echo "make docs      the documentation as a site, in site/"
	@echo "make setup     the virtual environment .venv alone"
	@echo "make referee   .venv-referee with torch and transformers, for golden files and benchmarks"

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: gptjax needs Python 3.12 or newer; install it (https://www.python.org/downloads), or name one: make PYTHON=/path/to/python"; exit 2; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: .venv/ready
	.venv/bin/python -m experiments.train --config configs/stdlib_gpt.py --workdir runs/stdlib_gpt

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile

verify: .venv/ready
ifneq (,$(filter serve all,$(PART)))
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[verify]'
	@command -v chromium >/dev/null || apt-get install -y --no-install-recommends chromium fonts-noto-cjk || \
	  echo "warning: chromium is missing, so the page is not tested; install it"
endif
	.venv/bin/python -m tests.verify --part $(PART)

docs: .venv/ready
	.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees docs site
	@echo "open site/index.html"

referee: .venv-referee/ready

.venv-referee/ready: constraints-referee.txt
	@test -n "$(REFEREE_PYTHON)" || { echo "error: the referee needs Python 3.11; name one: make referee REFEREE_PYTHON=/path/to/python3.11"; exit 2; }
	test -x .venv-referee/bin/python || $(REFEREE_PYTHON) -m venv .venv-referee
	.venv-referee/bin/python -m pip install --quiet --disable-pip-version-check --requirement constraints-referee.txt
	@touch $@

clean:
	rm -rf .venv .venv-referee .mypy_cache .pytest_cache .ruff_cache site docs/api jupyter_execute build
