# Every target sets up what it needs by itself: a virtual environment in .venv with the versions of constraints.txt.
# Nothing but Python 3.11 (or newer), make and git is required; no system library is, OpenCV's headless build included.

# The first interpreter on PATH that is new enough; name another with `make PYTHON=/path/to/python3.11 test`.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3 python; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	echo $$candidate; break; fi; done)
VENV ?= .venv
DEMO_OUT ?= outputs/demo
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.installed-demo
DEV_READY := $(VENV)/.installed-dev
DOCS_READY := $(VENV)/.installed-docs
# One thread a worker: two workers share two cores. Each begins with its half of the tests in their order and takes from
# the other's when it is done, so that what a file's tests share is nearly always made once.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

# Keeps albumentations from asking the network for a newer release whenever it is imported.
export NO_ALBUMENTATIONS_UPDATE := 1

.DEFAULT_GOAL := help
.PHONY: help demo setup test test-slow test-wheel lint format docs wheel toy-model performance clean

help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO_READY) ## render, train, edit, score on the toy world; writes outputs/demo/index.html and opens it
	$(BIN)/pbe demo --out $(DEMO_OUT)
	@page="$$(cd "$(DEMO_OUT)" && pwd)/index.html"; \
	if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; then \
	$(BIN)/python -m webbrowser -t "file://$$page" >/dev/null || echo "no browser could be opened"; fi; \
	echo "demo page: $$page"

setup: $(DEV_READY) ## make .venv with everything that development needs

test: lint ## everything that must pass: lint, then the tests
	$(PYTEST)

test-slow: $(DEV_READY) ## the tests that take minutes
	@status=0; $(PYTEST) -m slow || status=$$?; \
	if [ $$status -eq 5 ]; then echo "no test is marked slow"; status=0; fi; exit $$status

wheel: $(DEV_READY) ## build dist/pbe-*.whl, with configurations, toy world and toy model in it
	rm -f dist/pbe-*.whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

test-wheel: wheel ## install that wheel in a fresh environment outside the clone and use it
	$(BIN)/python scripts/check_wheel.py dist/pbe-*.whl

lint: $(DEV_READY) ## ruff (rules, format, docstrings), mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(DEV_READY) ## mend what ruff can mend, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_READY) ## build the documentation as a site in outputs/site; broken links and anchors are errors
	$(BIN)/python scripts/write_reference.py
	$(BIN)/zensical build --strict

toy-model: $(DEMO_READY) ## train the model that ships in data/toy/model again (hours on one core; resumes)
	$(BIN)/pbe toy train --out data/toy/model

performance: $(DEV_READY) ## run every benchmark (hours on two idle cores) and write docs/performance.md
	$(BIN)/python scripts/benchmarks/performance.py --run all

clean: ## remove caches and build products; .venv and outputs/ stay
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -not -path './.git/*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	"error: Python 3.11 or newer was not found: install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo \
	"error: $(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; }

$(DEMO_READY): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e ".[demo]"
	@touch $@

# The demo's packages are among the development ones, so one installation serves both.
$(DEV_READY): pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $(DEMO_READY) $@

$(DOCS_READY): $(DEV_READY)
	$(BIN)/pip install -c constraints.txt -e ".[docs]"
	@touch $@
