# Each command is also run by the README's test command or by a workflow; PYTHON chooses the environment.
PYTHON ?= python
PYTEST = $(PYTHON) -m pytest -n 2 --dist loadfile

.PHONY: quality test-core test gpu-check docs dist

quality:  ## lint, format check, types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test-core:  ## the optimizers and kernels alone
	$(PYTEST) tests/core

test: quality  ## everything
	$(PYTEST)

gpu-check:  ## tests and benchmarks of the CUDA kernel, on a machine with a GPU; the table goes into docs/benchmarks.md
	$(PYTHON) scripts/gpu_check.py

docs:  ## the documentation site, into site/
	$(PYTHON) -m mkdocs build --strict

dist:  ## sdist and wheel, into dist/
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*
