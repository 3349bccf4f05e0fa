# `make demo` (of your own sound: `make demo DATA=recordings`) and `make test` do everything on a machine with Python 3.11 or
# later; nothing is installed twice.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO ?= demo
# One thread per process: two processes of tests share two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo docs test test-all lint types imports unit slow coverage format clean
.DEFAULT_GOAL := test

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: name one with make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its pinned version, so that no other package's requirement decides which build is taken.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(INSTALL) torch
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.demo $(VENV)/.docs

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.torch
	$(INSTALL) -e '.[docs]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/bestrq2 demo --output $(DEMO) $(if $(DATA),--data '$(DATA)')

# The site, in build/site. Its pages open from the disk; to search them, serve the folder by python -m http.server.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo build/site/index.html

# The quick tier: at most six minutes on two cores.
test: lint types imports unit

# The slow tier too: full-size fuzzing, kills at random instants, several processes, Ray, browsers, the harnesses of X-ARES, HEAR and MTEB.
test-all: lint types imports unit slow

lint: $(VENV)/.dev
	.ci/large-files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

unit: $(VENV)/.dev
	$(PYTEST) --numprocesses 2 --dist worksteal -m "not slow"

slow: $(VENV)/.dev
	$(PYTEST) --numprocesses 2 --dist worksteal -m slow

coverage: $(VENV)/.dev
	$(BIN)/python -m coverage erase
	$(PYTEST) --numprocesses 2 --dist worksteal --cov --cov-report=term:skip-covered

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
