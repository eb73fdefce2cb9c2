# One command for each thing a person or a machine does with this repository. `make help` lists them.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
BIN := .venv/bin
ENVIRONMENT := .venv/.complete
NODE_MODULES := book/node_modules/.package-lock.json
SITE := _build/.site
LOGS := _build/logs

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# glibc hands every large buffer back to the system, and each step pays for new pages; with these it keeps them.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592

# $(call logged,name,command): run quietly; if it fails, show the end of its log.
logged = mkdir -p $(LOGS); { $(2); } </dev/null >$(LOGS)/$(1).log 2>&1 \
	|| { echo "Failed; the end of $(LOGS)/$(1).log:" >&2; tail -n 25 $(LOGS)/$(1).log >&2; exit 1; }

# $(call install,Debian packages): install them where this is possible, else say what to install and fail.
install = if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	echo "Missing on this system: $(1). Install it (Debian, Ubuntu: sudo apt-get install $(1)), then run make again." >&2; exit 1; fi; \
	echo "Installing $(1) with apt-get"; \
	$(call logged,apt,apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(1))

.PHONY: help
help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: book
book: $(SITE) ## execute the chapters and build the book: _build/html/index.html
	@echo "The book is at _build/html/index.html"

.PHONY: test
test: lint unit browser book ## lint, types, unit and parity tests, notebooks, the built page in a browser
	$(BIN)/pytest tests/book

.PHONY: unit
unit: $(ENVIRONMENT) assets ## the tests of the library only
	$(BIN)/pytest tests/unit tests/parity tests/cases
	$(BIN)/pytest tests/unit -m gpu --pretend

.PHONY: lint
lint: $(ENVIRONMENT) ## style, types, and no outputs in committed notebooks
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/nbstripout --verify --keep-id book/chapters/*.ipynb

.PHONY: lab
lab: $(ENVIRONMENT) assets ## open the chapters in JupyterLab
	$(BIN)/jupyter lab book

.PHONY: results
results: $(ENVIRONMENT) assets ## run the full experiments, for hours; an interrupted run goes on where it stopped
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.movies
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.reviews
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.common_rate
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.causal
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.below_chance
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.relaxation
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.masks
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.four_deltas
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.tweets
	$(BIN)/python -m selective_lite.lab.experiments.table

.PHONY: restamp
restamp: $(ENVIRONMENT) assets ## replay the first losses of rows whose code changed; keep those that agree
	$(KEEP_MEMORY) $(BIN)/python -m selective_lite.lab.experiments.restamp

.PHONY: benchmarks
benchmarks: $(ENVIRONMENT) assets ## measure speed and size against the targets, on a machine that does nothing else
	$(BIN)/python benchmarks/masked_step.py
	$(KEEP_MEMORY) $(BIN)/python benchmarks/delta.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/peak_memory.py
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/selecting.py
	$(KEEP_MEMORY) $(BIN)/python benchmarks/choosing.py
	$(BIN)/python benchmarks/importing.py
	$(BIN)/python benchmarks/targets.py

.PHONY: setup
setup: node browser $(ENVIRONMENT) $(NODE_MODULES) assets ## install everything, the system's part too (as root)

.PHONY: clean
clean: ## remove what was built; .venv and downloads stay
	rm -rf _build executed build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find selective_lite benchmarks tests book/_ext book/build -name __pycache__ -prune -exec rm -rf {} +

# What the system must have: Node for the scripts that the pages carry, Chromium for the browser tests.
.PHONY: node browser
node:
	@command -v npm >/dev/null || { $(call install,nodejs npm); }
browser:
	@command -v chromium >/dev/null || { $(call install,chromium); }

$(ENVIRONMENT): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Needs Python 3.11 or later; PYTHON=$(PYTHON). Say which: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call install,python3-venv); }
	@echo "Installing the pinned packages into .venv: some minutes the first time, log in $(LOGS)/pip.log"
	@$(call logged,pip,$(PYTHON) -m venv .venv && $(BIN)/pip install -r requirements.lock \
		&& $(BIN)/pip install --no-deps --no-build-isolation --editable .)
	@touch $@

$(NODE_MODULES): book/package.json book/package-lock.json | node
	@$(call logged,npm,npm ci --prefix book)
	@touch $@

# Downloads and verifies what is missing, and only verifies the rest.
.PHONY: assets
assets: $(ENVIRONMENT)
	@$(BIN)/python -m selective_lite.lab

# Always run: it decides by content which pages to execute, and renews this file only when the copy has changed.
executed/.stamp: FORCE $(ENVIRONMENT) assets
	@$(KEEP_MEMORY) $(BIN)/python book/build/execute.py

# Built from nothing each time: an incremental build would not repeat the warnings of pages that it leaves as they are.
$(SITE): executed/.stamp $(NODE_MODULES) _config.yml requirements.lock $(wildcard book/_ext/*)
	@rm -rf _build/html _build/.doctrees
	@$(BIN)/python book/_ext/vendor.py executed/_assets/vendor
	@$(BIN)/jupyter-book build executed --config _config.yml --path-output . -W --keep-going -q
	@touch $@

.PHONY: FORCE
FORCE:
