# `make test` and `make demo` need nothing but make and a Python >= 3.10: they create the virtual environment themselves.

VENV ?= .venv
# Leave PYTHON empty to take the first Python >= 3.10 that can create virtual environments.
PYTHON ?=
# A pip constraints file for the installation; `make test-floor` sets it.
CONSTRAINTS ?=
# Test processes; each uses one thread (tests/conftest.py), which on two cores is faster than one process with two.
WORKERS ?= 2

# What `make demo` draws.
DEMO_CLASSES ?= face-smiling cat-face heart animal-mammal animal-bird plant-flower food-fruit food-sweet \
    "sky & weather" transport-ground clothing person-role

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python3.10 python /usr/bin/python3)
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup test test-slow test-network test-floor lint format docs demo demo-train clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## create the virtual environment and install the package (about 6 GB, once)

$(PY):
	@for python in $(CANDIDATES); do \
	    if ! version=$$($$python -c 'import sys; print(".".join(map(str, sys.version_info[:3])))' 2>/dev/null); then \
	        tried="$$tried\n  $$python: not found"; \
	    elif ! $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	        tried="$$tried\n  $$python: version $$version is older than 3.10"; \
	    elif ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	        tried="$$tried\n  $$python: version $$version lacks the venv module (on Debian: apt install python3-venv)"; \
	    else \
	        echo "Creating $(VENV) with $$python ($$version)"; \
	        exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	printf "hf_fae needs Python >= 3.10 with the venv module. Tried:$$tried\nInstall one, or name it: make PYTHON=/path/to/python3\n" >&2; \
	exit 1

$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS) | $(PY)
	@echo "Installing hf_fae and its dependencies into $(VENV): about 6 GB, a few minutes"
	$(PY) -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable ".[dev,tensorboard]"
	@touch $@

test: $(INSTALLED) ## run the tests, without those marked slow
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(INSTALLED) ## run the tests marked slow
	$(PYTEST) -m slow $(ARGS)

test-network: $(INSTALLED) ## run the tests on the published weights: downloads tens of GB
	$(PYTEST) -n 0 -m network $(ARGS)

test-floor: ## run the tests with the oldest supported versions, in .venv-floor
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=constraints-floor.txt

lint: $(INSTALLED) ## check the code with ruff, and that imports run one way
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo

format: $(INSTALLED) ## let ruff sort the imports and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(INSTALLED) ## build the documentation into build/docs, without a warning
	$(PY) -m sphinx -W --keep-going -E -q docs build/docs $(ARGS)
	@echo "Open build/docs/index.html"

demo: $(INSTALLED) ## draw emoji with the models in checkpoints/, each in a new process
	@mkdir -p outputs/demo
	@for model in dit starflow; do \
	    $(VENV)/bin/hf-fae generate --model checkpoints/fae-$$model-emoji-256 --output outputs/demo/$$model.png \
	        --class $(DEMO_CLASSES) $(ARGS) || exit; \
	done
	@echo 'Train one yourself: "make demo-train" (minutes, small), docs/experiments/emoji-256.md (these very models), docs/guides/train.md'

demo-train: $(INSTALLED) ## train a small FAE and generator on emoji and draw samples (at most 20 minutes on 2 cores)
	$(PY) experiments/emoji/demo.py $(ARGS)

clean: ## delete build products, caches and outputs, not the virtual environments
	rm -rf build dist outputs src/*.egg-info .pytest_cache .ruff_cache
	find src tests training_scripts experiments benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
