# Each command is also run by the README's test command or by a workflow; PYTHON chooses the environment.
PYTHON ?= python
PYTEST = $(PYTHON) -m pytest -n 2 --dist loadfile

.PHONY: quality test-core test docs dist

quality:  ## lint, format check, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test-core:  ## the optimizers and kernels alone
	$(PYTEST) tests/core

test: quality  ## everything
	$(PYTEST)

docs:  ## the documentation site, into site/
	$(PYTHON) -m mkdocs build --strict

dist:  ## sdist and wheel, into dist/
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*
