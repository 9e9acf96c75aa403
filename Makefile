# `make demo` and `make test` set up what they need in .venv; `make help` lists the rest.
# Variables to set on the command line:
#   PYTHON      the Python (3.11 or newer) the environments are made from
#   TORCH_ARGS  more options for pip when it installs torch, such as an index of CPU-only builds
#   WORKERS     test processes
#   ARGS        more options for pytest (test and its kin) or for `tl-sparse demo` (demo)
#   DEMO_OUT    the folder the demo writes
PYTHON ?= python3
TORCH_ARGS ?=
WORKERS ?= 2
ARGS ?=
DEMO_OUT ?= demo-report

VENV := .venv
VENV_TL3 := .venv-tl3
VENV_TL2 := .venv-tl2
VENV_DOCS := .venv-docs

# One thread a process: the test models are so small that threads only get in each other's way.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled
comma := ,
# loadfile: fixtures that train a model are made once a file, not once a process.
PYTEST_OPTIONS := -n $(WORKERS) --dist loadfile --durations 20
# The shapes of tensors are the same with every TransformerLens: `make test` checks them, which takes time.
NO_SHAPES := --no-shapes

.DEFAULT_GOAL := help
.PHONY: help demo test test-tl3 test-tl2 conformance lint format types notebooks notebook-outputs docs clean

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

UV := uv==0.13.9
# Packages for an environment, with its own uv or pip.
INSTALL = .ci/install $(1)/bin/python $(1)/bin/python

# $(call set-up,environment,constraints file,extras): torch comes first and by its pin, so that a CPU
# build that is already at hand, or named by TORCH_ARGS, is kept by the second call.
define set-up
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "tl_sparse needs Python 3.11 or newer, but PYTHON=$(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
		"Name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
@echo "Setting up $(1) from $(2) (once; a few minutes)"
@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
@$(1)/bin/pip install --quiet $(UV) 2>/dev/null || true
@$(INSTALL) $(TORCH_ARGS) "$$(grep '^torch==' $(2))"
@$(INSTALL) --constraint $(2) --editable '.[$(3)]'
@touch $(1)/.set-up
endef

$(VENV)/.set-up: pyproject.toml constraints.txt
	$(call set-up,$(VENV),constraints.txt,dev$(comma)external)

$(VENV_TL3)/.set-up: pyproject.toml constraints-tl3.txt
	$(call set-up,$(VENV_TL3),constraints-tl3.txt,dev$(comma)external$(comma)sae)

$(VENV_TL2)/.set-up: pyproject.toml constraints-tl2.txt
	$(call set-up,$(VENV_TL2),constraints-tl2.txt,dev$(comma)tl2)

demo: $(VENV)/.set-up ## Train a small sparse model, find a circuit and write a report
	$(VENV)/bin/tl-sparse demo --out $(DEMO_OUT) $(ARGS)

test: $(VENV)/.set-up ## Run the tests with the current TransformerLens
	$(ONE_THREAD) $(VENV)/bin/python -m pytest $(PYTEST_OPTIONS) $(ARGS)

test-tl3: $(VENV_TL3)/.set-up ## Run the same tests with TransformerLens 3 and SAELens
	$(ONE_THREAD) $(VENV_TL3)/bin/python -m pytest $(NO_SHAPES) $(PYTEST_OPTIONS) $(ARGS)

# The environments of other targets join in where they are set up. The table is written even if a test
# fails: it then says WRONG, and the target fails.
conformance: $(VENV)/.set-up $(VENV_TL3)/.set-up ## Write docs/conformance.md from what the tests find
	@rm -rf build/conformance && mkdir -p build/conformance docs
	@failed=0; for env in $(VENV_TL3) $(VENV) $(VENV_TL2); do \
		[ -e $$env/.set-up ] || continue; \
		[ $$env != $(VENV_TL2) ] || without="-p tests.transformer_lens_2"; \
		$(ONE_THREAD) $$env/bin/python -m pytest $$without $(NO_SHAPES) $(PYTEST_OPTIONS) $(ARGS) tests/conformance \
			--ignore tests/conformance/test_table.py \
			--conformance-json build/conformance/$$env.json || failed=1; \
	done; \
	$(VENV)/bin/python -m tests.conformance.table build/conformance/.venv*.json \
		> build/conformance/table.md && cp build/conformance/table.md docs/conformance.md || failed=1; \
	exit $$failed

test-tl2: $(VENV_TL2)/.set-up ## Run them with TransformerLens 2, auto-circuit and circuit-tracer
	$(ONE_THREAD) $(VENV_TL2)/bin/python -m pytest -p tests.transformer_lens_2 $(NO_SHAPES) $(PYTEST_OPTIONS) $(ARGS)

lint: $(VENV)/.set-up ## Check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.set-up ## Apply formatting and the safe fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.set-up ## Check types, also in the snippets of README and docs
	$(VENV)/bin/python -m tests.snippets build/snippets
	$(VENV)/bin/mypy tl_sparse build/snippets

NOTEBOOKS = $(ONE_THREAD) $(OFFLINE) $(VENV)/bin/python -m tests.notebooks
notebooks: $(VENV)/.set-up ## Run every notebook: do its stored outputs still hold?
	$(NOTEBOOKS) check $(ARGS)

notebook-outputs: $(VENV)/.set-up ## Run them (or ARGS=notebooks/04*) and store what comes out
	$(NOTEBOOKS) write $(ARGS)

# The reference is read from the source, not imported; the gallery's pages are written by the package.
DOCS_TOOLS = $$($(PYTHON) -c "import tomllib; \
	print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")

$(VENV_DOCS)/.set-up: pyproject.toml
	@test -x $(VENV_DOCS)/bin/pip || $(PYTHON) -m venv $(VENV_DOCS)
	@$(VENV_DOCS)/bin/pip install --quiet $(DOCS_TOOLS)
	@touch $@

docs: $(VENV)/.set-up $(VENV_DOCS)/.set-up ## Build the documentation site (site/index.html)
	$(ONE_THREAD) $(OFFLINE) $(VENV)/bin/python benchmarks/gallery.py
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --quiet

clean: ## Remove the environments, caches and built files
	rm -rf $(VENV) $(VENV_TL3) $(VENV_TL2) $(VENV_DOCS) demo-report build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
