# Two commands: `make demo` shows the main job, `make test` passes the tests. Each makes its own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# For ArviZ 1.x, which needs Python 3.12 or later. (pyenv's commands exist for versions that are not switched on.)
PYTHON312 ?= $(shell for p in python3.12 python3.13 python3.14 python3 \
	"$$(pyenv prefix "$$(pyenv whence python3.12 2>/dev/null | tail -n 1)" 2>/dev/null)/bin/python"; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && echo "$$p" && break; done)
ARVIZ1 := .venv-arviz1

# The oldest versions allowed have no wheels for a later Python. Of those named in BUT, the version in constraints.txt.
PYTHON311 ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1 && echo "$$p" && break; done)
OLDEST := .venv-oldest$(if $(BUT),-$(BUT))
OLDEST_TESTS := tests/memory/test_memory.py tests/train/test_checkpoint.py tests/data/test_files.py tests/infer/test_vimco.py \
	tests/infer/test_resampled_backward.py tests/reliability/test_interruptions.py

# Tests are shared out among so many processes, of one thread each: more threads than cores wait for each other.
PROCESSES ?= 2

.PHONY: demo test test-long test-all test-arviz1 test-oldest audit check lint types docs linkcheck notebooks jupyter clean

demo: $(VENV)/.demo
	$(BIN)/pyro-vmem demo $(ARGS)

PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

test: $(VENV)/.test
	$(PYTEST) -m "not long" $(ARGS)

# What `make test` leaves out: benchmarks, notebooks, commands in processes of their own, training on other devices.
test-long: $(VENV)/.test
	$(PYTEST) -m long $(ARGS)

test-all: test test-long

test-arviz1:
	@python="$(PYTHON312)"; \
	if [ -z "$$python" ]; then \
		echo "test-arviz1: left out, as there is no Python 3.12 or later; name one: make test-arviz1 PYTHON312=..."; \
	else \
		$(MAKE) --no-print-directory VENV=$(ARVIZ1) PYTHON="$$python" $(ARVIZ1)/.arviz && \
		$(ARVIZ1)/bin/python -m pytest tests/diagnostics/test_export.py; \
	fi

# On the oldest versions that pyproject.toml allows: 3 GB for torch, which `make test-oldest BUT=torch` does without.
test-oldest:
	@if [ -z "$(PYTHON311)" ]; then \
		echo "test-oldest: left out, as there is no Python 3.11 or 3.12; name one: make test-oldest PYTHON311=..."; \
	elif $(MAKE) --no-print-directory $(OLDEST)/.oldest; then \
		$(OLDEST)/bin/python -m pytest -q -W ignore::DeprecationWarning $(OLDEST_TESTS); \
	else \
		echo "test-oldest: left out, as these versions could not be installed; see above."; \
	fi

# Known vulnerabilities of the versions in constraints.txt; it fails where the registry cannot be asked.
audit: $(VENV)/.test
	$(BIN)/python -m pip install -q --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --strict -r constraints.txt --no-deps --disable-pip

check: lint types test-all

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("pyro_vmem needs Python 3.11 or later; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[plots,cli]'
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.arviz: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[arviz,plots]' pytest 'arviz>=1'
	touch $@

$(OLDEST)/.oldest: pyproject.toml constraints.txt .ci/oldest.py
	$(PYTHON311) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python .ci/oldest.py plots cli vision flows --but $(BUT) > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install -q --disable-pip-version-check -r $(OLDEST)/oldest.txt pytest hypothesis scipy
	touch $@

# The site, in docs/_build/html; its notebooks have the outputs of the last `make notebooks`.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -E -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Whether the links to the outside can be reached; those between pages are tested.
linkcheck: $(VENV)/.docs
	$(BIN)/python -m sphinx -b linkcheck docs docs/_build/linkcheck

# Runs in full the notebooks whose code has changed, and keeps their outputs for the site in docs/notebook_runs.
notebooks: $(VENV)/.docs
	$(BIN)/python docs/run_notebooks.py $(ARGS)

# The notebooks in a browser.
jupyter: $(VENV)/.notebooks
	$(BIN)/jupyter lab notebooks

$(VENV)/.docs: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.notebooks: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[notebook]'
	touch $@

clean:
	rm -rf $(VENV) $(ARVIZ1) .venv-oldest* .pytest_cache .mypy_cache .ruff_cache .coverage htmlcov dist build docs/_build docs/api docs/notebooks
