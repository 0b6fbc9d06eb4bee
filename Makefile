PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help train test test-long test-fast test-lowest test-newest coverage check lint types docs clean

help: ## Shows this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# Warnings of build tools and of other packages' code say nothing about this one.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e ".[deepspeed,docs,eval,quantization,serve,test,viz]"
	@# 42 MB. One of the packages is built from C: where there is no compiler, its tests are skipped.
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt reasoning-gym || echo "reasoning-gym was not installed."
	@# Byte code, on all cores, but of what is hardly imported. Some packages ship files that are not for this Python, which counts as a failure there.
	PYTHONWARNINGS=ignore $(BIN)/python -m compileall -qq -j 0 -x '/(tests|pip|debugpy|nltk|sklearn|transformers/models)/' $(VENV)/lib || true
	touch $@

train: $(BIN)/.installed ## Trains the embedded policy on 4x4 sudoku and shows what it gained. ARGS="..." for options.
	$(BIN)/trl-diffusion train $(ARGS)

test: $(BIN)/.installed ## Runs the tests.
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not long" $(ARGS)

test-long: $(BIN)/.installed ## Runs the tests that `make test` leaves out because they take long.
	$(BIN)/python -m pytest -n auto --dist worksteal -m long $(ARGS)

test-fast: $(BIN)/.installed ## Runs the tests that take no more than a few seconds each.
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not distributed and not long" $(ARGS)

# What moves fastest at its lowest version, over the other packages of $(VENV).
.venv-lowest/.installed: $(BIN)/.installed constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$(.venv-lowest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth"
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt transformers trl
	touch $@

test-lowest: .venv-lowest/.installed ## Runs the contract and trainer tests on the lowest TRL and transformers.
	.venv-lowest/bin/python -m pytest -n auto --dist worksteal tests/sft/test_trainer.py $(addprefix tests/trainer/test_,$(addsuffix .py, \
		trl_contract training old_policy loss rollouts precision config input_checks autoregression throughput)) $(ARGS)

# What moves fastest at the newest version that the index has, whatever pyproject.toml allows. Not kept: the newest is another one soon.
test-newest: $(BIN)/.installed ## Runs the tests that take no more than a few seconds each on the newest TRL, transformers, ...
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$(.venv-newest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth"
	.venv-newest/bin/python -m pip install --quiet --upgrade transformers trl peft accelerate datasets
	.venv-newest/bin/python -m pip list | grep -E "^(transformers|trl|peft|accelerate|datasets) "
	.venv-newest/bin/python -m pytest -n auto --dist worksteal -m "not slow and not distributed" $(ARGS)

lint: $(BIN)/.installed ## Checks style.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.installed ## Checks types.
	$(BIN)/mypy

# What typesets the formulas of the documentation.
docs/node_modules/.installed: docs/package.json docs/package-lock.json
	@command -v npm > /dev/null || { echo "The formulas of the documentation are typeset by KaTeX: install Node.js with npm."; exit 1; }
	npm ci --prefix docs --loglevel=error
	touch $@

docs: $(BIN)/.installed docs/node_modules/.installed ## Builds the documentation into site/. Links that lead nowhere are errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

coverage: $(BIN)/.installed ## Runs the tests, and shows which lines of the package they run. Fewer than 90 % are an error.
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered $(ARGS)

check: lint types docs ## Checks all that needs no run: style, types, documentation.

clean: ## Removes the virtual environment and what runs have written.
	rm -rf $(VENV) .venv-lowest .venv-newest docs/node_modules outputs site
