# The first target that needs it makes a virtual environment, with all tools, and builds the extensions in
# place.  Variables: PYTHON (an interpreter >= 3.11), VENV, ARGS (for pytest: make test ARGS="-k A01 -x").

PYTHON ?= $(shell tools/find-python)
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
SOURCES := setup.py $(wildcard src/pgbgw/*.pyx src/pgbgw/*.pxd src/pgbgw/*.h)

.PHONY: build lint format type test model fault soak bench bench-quick test-all check demo dist clean
# Builds for different interpreters share the generated C.
.NOTPARALLEL:

build: $(VENV)/.built

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint src
	$(BIN)/codespell

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: build
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml pgbgw

test: build
	$(BIN)/python -m pytest $(ARGS)

# What a process can do to the others, tried: ten minutes on two cores, a table at the end.
fault: build
	tools/need-programs spin valgrind
	$(BIN)/python -m pytest --form=fault -n 2 --dist=loadgroup tests/fault $(ARGS)

# The same and the other long tests, in their long forms: hours.
soak: build
	tools/need-programs spin valgrind
	$(BIN)/python -m pytest --form=soak -n 2 --dist=loadgroup $(ARGS)

# pgbgw beside PostgreSQL and other libraries: results and plots, the better part of an hour.
bench: $(VENV)/.bench
	cd bench && "$(abspath $(BIN))/python" run.py $(ARGS) && "$(abspath $(BIN))/python" plot.py

# A minute, compared with the results that are committed.
bench-quick: $(VENV)/.bench
	$(BIN)/python bench/compare.py $(ARGS)

# The model of the slot protocol, its seeded bugs, the memory orders.
model:
	tools/need-programs spin
	python3 tests/model/check.py


test-all: test-3.11 test-3.12 test-3.13

test-%:
	python=$$(tools/find-python $*) && $(MAKE) --no-print-directory test PYTHON="$$python" VENV=.venv-$*

check: lint type test

demo: build
	$(BIN)/python examples/checksums.py

dist: $(VENV)/.ready
	$(BIN)/python -m build

# Leaves the virtual environments; the next build fills them again.
clean:
	rm -rf build dist src/pgbgw.egg-info src/pgbgw/*.so src/pgbgw/_*.c .venv*/.built
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find src tests examples tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --upgrade --group dev
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.bench: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --upgrade --group bench
	touch $@

# Compiles only what changed since.
$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
