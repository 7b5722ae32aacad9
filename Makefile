# `make help` lists the targets. Each makes .venv first, and again when what it is made from changed.
PYTHON ?= python3
UV ?= .venv/bin/uv
TORCH_INDEX ?=

BIN := .venv/bin
STAMP := .venv/.expertcut-ready
PIP := $(BIN)/python -m pip install
LOCKED := $(PIP) --require-hashes --no-build-isolation --constraint constraints.txt
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
NAMES := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")
# The registry's torch for Linux brings CUDA. This is the CPU build, Python 3.11 Linux x86-64.
TORCH_CPU := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b

# Idle threads sleep, so that processes do not starve one another, but first spin some microseconds:
# asleep at once, they took up to four times as long on an idle machine (docs/benchmarks.md).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 1000

.PHONY: help venv quickstart test soak lint lowest newest advisories constraints clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile

venv: $(STAMP) ## .venv with this project and its development tools, every file checked by hash

quickstart: $(STAMP) ## the tour of the README, on the bundled model
	PATH="$(CURDIR)/$(BIN):$$PATH" expertcut run recipes/quickstart.yaml

test: $(STAMP) ## the tests, with branch coverage of at least 95 %
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov $(PYTEST_ARGS)

soak: $(STAMP) ## breaks it on purpose for about a quarter of an hour, and prints the figures
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.kills --moments 100 --seed 0
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.faults
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak.fuzz --minutes 10

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lowest newest: PLACE = .venv-$@
lowest: RESOLUTION = lowest-direct
newest: RESOLUTION = highest
lowest: $(STAMP) ## the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(TEST_OTHERS)

newest: $(STAMP) ## the tests with the newest that there are, in .venv-newest
	$(TEST_OTHERS)

# Without [tool.uv], which pins torch. Several GB each, for the index's torch brings CUDA.
define TEST_OTHERS
$(UV) venv --quiet --clear --python $(BIN)/python $(PLACE)
$(UV) pip install --no-config --python $(PLACE)/bin/python --resolution $(RESOLUTION) \
	--requirement pyproject.toml --extra dev
$(UV) pip install --no-config --python $(PLACE)/bin/python --no-deps --editable .
OMP_NUM_THREADS=1 $(PLACE)/bin/python -m pytest -n 2 $(PYTEST_ARGS)
endef

advisories: $(STAMP) ## known vulnerabilities in constraints.txt, where PyPI or OSV can be asked
	$(BIN)/python .ci/advisories.py $(UV)

# Does not ask for a current .venv: that may need the very pins that are made here.
constraints: ## pin the dependencies anew (UV_ARGS=--upgrade for newer ones)
	@test -x "$$(command -v $(UV))" || $(MAKE) venv
	$(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 \
		--fork-strategy fewest --extra dev --custom-compile-command "make constraints" $(UV_ARGS) \
		pyproject.toml --output-file constraints.txt
	awk '/^torch==/ { print "# The first hash: CPU build, Python 3.11 Linux x86-64."; print; \
		print "    --hash=sha256:$(TORCH_CPU) \\"; next } !/$(TORCH_CPU)/ { print }' \
		constraints.txt > constraints.tmp
	mv constraints.tmp constraints.txt

clean: ## remove what tests and builds leave, but not .venv, profiles or checkpoints
	rm -rf build dist src/*.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@$(BIN)/python $(IS_NEW_ENOUGH) 2>/dev/null || $(PYTHON) $(IS_NEW_ENOUGH) 2>/dev/null || { \
		echo "expertcut needs Python 3.11 or newer, but $(PYTHON) --version says:" \
			"$$($(PYTHON) --version 2>&1). Try make venv PYTHON=python3.11" >&2; exit 1; }
	$(BIN)/python $(IS_NEW_ENOUGH) 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	# Old pips take no hashes from constraints, so these two come from a requirements file.
	sed -n -e '/^pip==/,/#/p' -e '/^setuptools==/,/#/p' constraints.txt > .venv/tools.txt
	$(PIP) --require-hashes --requirement .venv/tools.txt
ifeq ($(TORCH_INDEX),)
	# A build on pip's find-links comes first: by itself pip prefers files whose index shows a hash.
	$(LOCKED) --no-index --no-deps torch > .venv/torch.log 2>&1 || \
		! grep --after-context=99 'DO NOT MATCH' .venv/torch.log
else
	sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt > .venv/torch.txt
	$(PIP) --no-deps --index-url $(TORCH_INDEX) --requirement .venv/torch.txt
endif
	@$(BIN)/python -c '$(NAMES)' > .venv/names.txt
	$(LOCKED) --requirement .venv/names.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
