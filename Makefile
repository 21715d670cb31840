# `make` or `make help` lists the targets. PYTHON=... chooses the interpreter the environment is made with.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Slow modules first: those on real data lead the alphabet, and a late start of one would leave the other core idle.
PYTEST_ARGS ?= -n auto --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo docs gallery test lint format clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pix2mass needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e . --group dev
	@touch $@

demo: $(STAMP) ## the whole method on a mock sky: images, both networks, scores, report.html
	$(BIN)/pix2mass demo

docs: $(STAMP) ## these pages as a site, docs/build/site/index.html, with the tutorial run; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -q -b html -d docs/build/doctrees docs docs/build/site

gallery: $(STAMP) ## pictures of the mock sky in docs/build/, real ones beside where PIX2MASS_DATA is set
	$(BIN)/python docs/gallery.py

test: $(STAMP) ## all tests; PYTEST_ARGS='-n auto --dist loadscope --no-loadscope-reorder -m "not slow"' for the quick ones
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and pyright, without changing a file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## sort imports, mend what can be mended, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and all caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist docs/build
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
