SHELL = /bin/bash
LINT_PATHS = sb3_ezv2/ tests/ benchmarks/ docs/conf.py setup.py sb3_ezv2_zoo_hook.py

# Every target makes the virtual environment it needs, once: stamp files in $(VENV) remember what is installed.
# To work in an environment of your own instead, name its Python: make test PY=python
PYTHON ?= python3
VENV ?= .venv
# Tests run in so many processes of one thread each: make test TEST_PROCESSES=4
TEST_PROCESSES ?= 2
BUILD_INPUTS = pyproject.toml setup.cfg setup.py constraints.txt sb3_ezv2_zoo.pth \
	$(wildcard sb3_ezv2/ctree/*.pyx sb3_ezv2/ctree/*.pxd sb3_ezv2/ctree/*.hpp)

ifeq ($(origin PY), undefined)
PY = $(VENV)/bin/python
FOR_DEMO = $(VENV)/.installed-demo
FOR_TESTS = $(VENV)/.installed-tests
FOR_DOCS = $(VENV)/.installed-docs
endif

# The constraints hold for what is installed and for what builds the extension (two names: old pip, new pip).
PIP_INSTALL = PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	$(VENV)/bin/python -m pip install -qq

help:
	@echo "make demo            train EZV2 on CartPole-v1, evaluate, save and draw (about five minutes with the installation)"
	@echo "make test            run the tests"
	@echo "make soak            the long form of the tests of crashes, interruptions and long runs (a quarter of an hour)"
	@echo "make sanitize        run the tests of the compiled parts with AddressSanitizer (gcc)"
	@echo "make venv            only make the virtual environment, with all that tests and code checks need"
	@echo "make format          sort imports and format with black"
	@echo "make check-codestyle the same, without changing a file"
	@echo "make lint            check with ruff"
	@echo "make type            check types with mypy"
	@echo "make commit-checks   format, lint and type"
	@echo "make docs            build the documentation, warnings are errors"
	@echo "make dist            build the source distribution and the wheel"
	@echo "make clean           delete the virtual environment and everything built"

# --- set-up ----------------------------------------------------------------------------------------------------------

venv: $(FOR_TESTS)

# PyTorch first and by itself: it is most of the download, and no later change of the package repeats it.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	@command -v "$${CXX:-c++}" > /dev/null || { echo "A C++ compiler is needed (g++ or clang++)."; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
		|| { echo "Python's headers are needed (the package python3-dev or python3-devel of your system)."; exit 1; }
	@echo "Making $(VENV) and installing PyTorch (the first time only; this takes a minute or two) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) torch
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.torch $(BUILD_INPUTS)
	@echo "Installing sb3-ezv2 and what the demo needs ..."
	@$(PIP_INSTALL) -e . matplotlib tqdm rich
	@touch $@

$(VENV)/.installed-tests: $(VENV)/.torch $(BUILD_INPUTS)
	@echo "Installing sb3-ezv2 and what the tests need ..."
	@$(PIP_INSTALL) -e '.[tests,zoo,atari,dmc]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.torch $(BUILD_INPUTS)
	@echo "Installing sb3-ezv2 and what the documentation needs ..."
	@$(PIP_INSTALL) -e '.[docs]'
	@touch $@

# --- use -------------------------------------------------------------------------------------------------------------

# One thread: these networks are small, so that more threads mostly wait for each other, and on a busy machine many times
# longer than they compute.
demo test soak: export OMP_NUM_THREADS = 1
demo test soak: export MKL_NUM_THREADS = 1

demo: $(FOR_DEMO)
	$(PY) -m benchmarks.demo

# JAX, the reference of the search, on the CPU: what is compared is the same everywhere.
test: export JAX_PLATFORMS = cpu
test: $(FOR_TESTS)
	$(PY) -m pytest -q --numprocesses $(TEST_PROCESSES) --dist worksteal tests

# The result of a run is in docs/guide/saving.rst.
soak: $(FOR_TESTS)
	$(PY) tests/soak.py

sanitize: $(FOR_TESTS)
	PY="$(abspath $(PY))" tests/sanitize.sh

mypy: $(FOR_TESTS)
	$(PY) -m mypy $(LINT_PATHS)

type: mypy

lint: $(FOR_TESTS)
	$(PY) -m ruff check $(LINT_PATHS) --output-format=concise

format: $(FOR_TESTS)
	# Sort imports
	$(PY) -m ruff check --select I $(LINT_PATHS) --fix
	# Reformat using black
	$(PY) -m black $(LINT_PATHS)

check-codestyle: $(FOR_TESTS)
	# Sort imports
	$(PY) -m ruff check --select I $(LINT_PATHS)
	# Reformat using black
	$(PY) -m black --check $(LINT_PATHS)

commit-checks: format lint type

docs: $(FOR_DOCS)
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

dist: $(FOR_TESTS)
	$(PIP_INSTALL) build
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(PY) -m build

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f sb3_ezv2/ctree/_*.so sb3_ezv2/ctree/_*.pyd sb3_ezv2/ctree/_*.cpp

.PHONY: help venv demo test soak sanitize mypy type lint format check-codestyle commit-checks docs dist clean
