# make book   execute every notebook and build the book         make notebooks   re-execute in place (NB=nbs/x.ipynb for one)
# make test   every check of the project                        make export      notebooks -> diffnotes/
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
PYTHON ?= python3
JOBS ?= 2
NB ?= $(wildcard nbs/*.ipynb)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CACHE := _build/.jupyter_cache
PEERS := _build/peers
# One thread a process: two spinning pools on two cores are ten times slower.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export JUPYTERCACHE := $(CACHE)

.PHONY: help setup book test evaluate notebooks export ledger mutants bench lock clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## the development environment in .venv

$(READY): requirements-dev.txt settings.ini setup.py pyproject.toml
	@echo "== setting up $(VENV) (first time: some minutes)"
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11, 5) or sys.exit("the book needs Python 3.11.5 or newer, found %d.%d.%d: make PYTHON=python3.12 ..." % v[:3])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

book: $(READY) ## execute every notebook, build the book strictly
	@stamp=$$(cat requirements-dev.txt diffnotes/*.py diffnotes/assets/*/* diffnotes/assets/*.npz | sha256sum)
	if [ "$$(cat $(CACHE)/library.sha256 2>/dev/null)" != "$$stamp" ]; then
		echo "== the library is new or has changed: every notebook is executed again"
		rm -rf $(CACHE) && mkdir -p $(CACHE) && echo "$$stamp" > $(CACHE)/library.sha256
	fi
	echo "== executing the notebooks ($(JOBS) at a time)"
	$(BIN)/jcache notebook add nbs/*.ipynb >/dev/null
	TQDM_DISABLE=1 $(BIN)/jcache project execute --executor local-parallel --timeout 300
	echo "== building the pages"
	$(BIN)/jupyter-book build nbs --path-output . --config $(CURDIR)/_config.yml --toc $(CURDIR)/_toc.yml -W -n --keep-going $(BOOKFLAGS)
	echo "== the book: $(CURDIR)/_build/html/index.html"

test: $(READY) ## export in sync, notebooks clean, ruff, tests, every notebook executed
	@echo "== style"
	$(BIN)/ruff check .
	echo "== tests"
	$(BIN)/pytest tests -n $(JOBS) --dist loadfile $(TESTFLAGS)
	echo "== every notebook, cell by cell"
	$(BIN)/pytest nbs --nbval-lax --nbval-current-env --nbval-cell-timeout 300 -n $(JOBS) --dist loadfile

evaluate: $(READY) ## judge the weights that ship against the digits
	@$(BIN)/diffnotes evaluate digits

notebooks: $(READY) export ## re-execute the notebooks in place, normalised
	@for nb in $(NB); do
		echo "== $$nb"
		TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level WARN \
			--ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=300 $$nb
		$(BIN)/nbstripout --keep-output --keep-count --keep-id $$nb
	done
	$(MAKE) --no-print-directory ledger

export: $(READY) ## write diffnotes/ from the notebooks
	@$(BIN)/python tools/export.py

ledger: $(READY) ## write nbs/ledger.md, the table of equations and checks, and nbs/pitfalls.md
	@$(BIN)/python tools/ledger.py
	$(BIN)/python tools/pitfalls.py

mutants: $(READY) ## break exported formulas one by one and see which breaks the chapters catch
	@$(BIN)/python tools/mutants.py $(NB)

bench: $(READY) $(PEERS)/.ready ## the measurements of benchmarks/, and the samplers beside other libraries'
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done
	echo "== benchmarks/solvers"
	$(PEERS)/bin/python benchmarks/solvers $(TABLES)

# The development environment's packages, torch among them, are seen from the peers' through a .pth file.
$(PEERS)/.ready: benchmarks/peers.txt $(READY)
	@echo "== setting up $(PEERS)"
	rm -rf $(PEERS) && $(PYTHON) -m venv $(PEERS)
	here='import sysconfig; print(sysconfig.get_path("purelib"))'
	$(CURDIR)/$(BIN)/python -c "$$here" > "$$($(PEERS)/bin/python -c "$$here")/development.pth"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt
	touch $@

lock: ## pin requirements-dev.txt anew from requirements-dev.in
	@rm -rf _build/lock && $(PYTHON) -m venv _build/lock
	_build/lock/bin/python -m pip install --quiet -r requirements-dev.in
	{ echo "# Pinned by make lock from requirements-dev.in."; \
		_build/lock/bin/python -m pip freeze --all | grep -viE '^(pip|diffnotes)==' | sed 's/+cpu$$//'; } > requirements-dev.txt

clean: ## remove what was built (the environment stays)
	rm -rf _build build *.egg-info .pytest_cache .ruff_cache
