# `make demo` and `make test` need Python 3.11 or later, make and git, and install the rest here.
# EXTRAS=cuda (CUDA 13: driver 580 or later) or EXTRAS=tpu installs JAX for accelerators too, and
# EXTRAS=ray,tracking,detection,nuclei adds the packages without which some tests are skipped.
# `make accelerators` installs the compiler of TPUs (0.7 GB) into an environment of its own; with
# EXTRAS=cuda TOPOLOGIES=gpu:h100 that of GPUs (4 GB).
PYTHON ?= python3
EXTRAS ?=
VENV ?= .venv
TOPOLOGIES ?= tpu:v5e:2x2 tpu:v5p:2x2x1
BIN := $(VENV)/bin
READY := $(VENV)/ready$(addprefix -,$(EXTRAS))
DEMO := runs/demo
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
# Tests of one file share what they compile, so a file stays in one process. Files are not ordered
# by their numbers of tests: the longest ones have few, and would end up alone at the end.
PARALLEL := -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: demo test test-slow test-accelerators mutants chaos accelerators compile-accelerators figures claims docs test-docs lint lock clean help

demo: $(READY)  ## train plain and residual networks and draw what depth does to them (minutes)
	$(BIN)/resjax sweep experiments/degradation.py --config=configs/quickstart.py --workdir=$(DEMO)

test: lint  ## check style, types and layers, then run the tests
	$(BIN)/pytest -q $(PARALLEL)

test-slow: $(READY)  ## run every test, those of minutes too
	$(BIN)/pytest -q -m "" $(PARALLEL)

test-accelerators:  ## compile a small network for TPUs that are not here, and test what it became
	$(MAKE) .venv-accelerators/ready-tpu VENV=.venv-accelerators EXTRAS=tpu
	JAX_PLATFORMS=cpu .venv-accelerators/bin/pytest -q tests/benchmarks/test_accelerators.py tests/xla/test_topologies.py

mutants: $(READY)  ## put small faults into a copy of the code; say which ones no test finds
	$(BIN)/python tests/mutants.py

chaos: $(READY)  ## kill, damage and fill up what runs leave on disk, and write docs/chaos.md (an hour)
	$(BIN)/python benchmarks/chaos.py measure
	$(BIN)/python benchmarks/chaos.py report

accelerators:  ## compile for TPUs that are not here, and write docs/accelerators.md (an hour)
	$(MAKE) compile-accelerators VENV=.venv-accelerators EXTRAS=$(or $(EXTRAS),tpu)

compile-accelerators: $(READY)
	for topology in $(TOPOLOGIES); do $(BIN)/python benchmarks/accelerators.py measure --topology $$topology || exit; done
	$(BIN)/python benchmarks/accelerators.py report

figures: $(READY)  ## draw the docs' figures and tables anew from experiments/results
	for script in throughput seeds feeds freezing chaos parity bookkeeping accelerators; do $(BIN)/python benchmarks/$$script.py report || exit; done
	for run in $(wildcard experiments/results/*/sweep.json experiments/results/*/*/sweep.json); do \
		folder=$$(dirname $$run); name=$$(sed -n 's/^  "experiment": "\(.*\)",/\1/p' $$run); \
		file=experiments/$$name.py; [ -e $$file ] || file=$$folder/experiment.py; \
		$(BIN)/resjax report $$folder --experiment=$$file || exit; \
		case $$folder in experiments/results/*/*) ;; *) cp $$folder/figures/$$name.svg docs/$$(basename $$folder).svg;; esac; done
	for figure in docs/digits/*.svg docs/scenes/*.svg; do \
		file=$$(basename $$figure); data=$$(basename $$(dirname $$figure)); \
		cp experiments/results/$$data/$${file%%.*}/figures/$${file#*.} $$figure || exit; done

claims: $(READY)  ## judge the papers' claims by the committed runs anew, and write docs/claims.md
	$(BIN)/python -m resjax.analysis.claims_page experiments/results experiments docs/claims.md

# With --quiet, mkdocs would ignore --strict.
docs: $(READY) .venv-docs/ready  ## build the documentation site, site/html; warnings are errors
	$(BIN)/python docs/make_pages.py site/pages
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

test-docs: docs  ## build the site, and test every page of it in a browser
	RESJAX_TEST_SITE=site/html $(BIN)/pytest -q $(PARALLEL) --dist load tests/test_site_in_browser.py

lint: $(READY)  ## check style, types and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

lock:  ## pin the newest versions for every supported Python (needs uv)
	uv pip compile --universal --python-version 3.11 --group dev --upgrade --no-header \
		--quiet pyproject.toml --output-file requirements.lock
	uv pip compile --universal --python-version 3.11 --extra ray --extra tracking \
		--extra detection --extra nuclei --upgrade --constraint requirements.lock --no-header --no-annotate --quiet pyproject.toml \
		--output-file extras.lock
	uv pip compile --universal --python-version 3.11 --group docs --upgrade --constraint requirements.lock \
		--no-header --no-annotate --quiet --output-file docs.lock

clean:  ## remove the environment, the demo and all caches
	rm -rf .venv .venv-accelerators .venv-docs site $(DEMO) *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile | column -t -s:

.venv-docs/ready: docs.lock
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --requirement docs.lock
	touch $@

$(READY): requirements.lock extras.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "resjax needs Python 3.11 or later; name one: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -c 'import sys, tomllib; \
		known = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		unknown = {*"$(EXTRAS)".split(",")} - {"", *known}; \
		unknown and sys.exit(f"EXTRAS: no extra {min(unknown)}; known: " + ", ".join(known))'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --requirement requirements.lock
	$(INSTALL) --no-build-isolation \
		$(if $(EXTRAS),--constraint requirements.lock --constraint extras.lock,--no-deps) \
		--editable '.$(addsuffix ],$(addprefix [,$(EXTRAS)))'
	touch $@
