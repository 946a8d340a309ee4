# Two commands matter: `make demo` and `make test`. Both set up what they need in .venv first and cost
# nothing the second time. PYTHON=python3.12 chooses another interpreter, AGORA_CUDA_ARCHS="80;90" compiles
# the CUDA kernels for machines that have no GPU themselves.

PYTHON ?= python3
CXX ?= c++
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
KERNELS := setup.py CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: help demo test test-long lint format docs clean distclean

help:
	@echo "make demo       set up, then train a small model with a whole swarm on this machine (ARGS='--steps 20')"
	@echo "make test       set up, then check style and types and run the tests (under 15 minutes on 2 cores)"
	@echo "make test-long  the tests that take longer: chaos, fuzzing, soak (more than an hour)"
	@echo "make docs       the documents as a site, links checked"
	@echo "make lint       style and types only"
	@echo "make format     put the style right"
	@echo "make clean      remove what was built;  make distclean: .venv too"

demo: .venv/.installed
	@$(BIN)/agoractl demo $(ARGS)

# Most run in two processes beside each other; whole swarms, which need both cores, run alone after them.
BESIDE := tests/unit tests/sim tests/interop tests/fuzz tests/net \
          $(patsubst %,tests/system/test_%.py,authority_kills bad_input commands doctor join systemd)
ALONE := $(filter-out $(BESIDE),$(wildcard tests/system/test_*.py))
QUICK := -m "not long and not gpu"

# Of the long ones, those that neither measure nor need both cores.
LONG_BESIDE := tests/unit tests/sim tests/fuzz $(patsubst %,tests/system/test_%.py,authority_away authority_crash authority_kills)
LONG_ALONE := tests/interop tests/net $(filter-out $(LONG_BESIDE),$(wildcard tests/system/test_*.py))
LONG := -m long --timeout 3600

test: .venv/.tools lint
	@echo "make: running the tests"
ifneq ($(filter tests/%,$(ARGS)),)
	@$(BIN)/python -m pytest $(QUICK) $(ARGS)
else
	@$(BIN)/python -m pytest $(QUICK) $(ARGS) -n 2 --dist loadfile $(BESIDE) || [ $$? = 5 ] # 5: ARGS chose none
	@$(BIN)/python -m pytest $(QUICK) $(ARGS) $(ALONE) || [ $$? = 5 ]
endif

test-long: .venv/.tools
	@echo "make: running the long tests"
ifneq ($(filter tests/%,$(ARGS)),)
	@$(BIN)/python -m pytest $(LONG) $(ARGS)
else
	@$(BIN)/python -m pytest $(LONG) $(ARGS) -n 2 --dist loadfile $(LONG_BESIDE) || [ $$? = 5 ]
	@$(BIN)/python -m pytest $(LONG) $(ARGS) $(LONG_ALONE) || [ $$? = 5 ]
endif

lint: .venv/.tools
	@echo "make: checking style and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))

docs: .venv/.tools
	@$(BIN)/mkdocs build --quiet --strict
	@echo "make: the pages are in build/site"

format: .venv/.tools
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .
	@$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

# The package itself. The stamp is made last, so that an interrupted set-up is done again.
.venv/.installed: pyproject.toml constraints.txt $(KERNELS)
	@command -v $(PYTHON) >/dev/null || { echo "make: python3 is missing: apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: Python 3.11 or newer is needed, $(PYTHON) is older: name a newer one with PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make: Python's venv module is missing: apt install python3-venv" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "make: a C++ compiler is missing: apt install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' || { \
	  echo "make: Python's headers are missing: apt install python3-dev" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || { echo "make: creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "make: installing the package and its requirements, compiling the kernels (minutes the first time)"
	@$(PIP) install --quiet -c constraints.txt -e . || { \
	  echo "make: the installation failed; the lines above say at what" >&2; exit 1; }
	@touch $@

# What tests and lint need on top; read from pyproject.toml, so that the kernels are not compiled again.
.venv/.tools: .venv/.installed
	@echo "make: installing the test tools"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"], sep="\n")' > .venv/test-tools.txt
	@$(PIP) install --quiet -c constraints.txt -r .venv/test-tools.txt || { \
	  echo "make: the installation of the test tools failed; the lines above say at what" >&2; exit 1; }
	@touch $@

clean:
	rm -rf build dist *.egg-info agora_kernels*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find agorad p2p stage tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f .venv/.installed .venv/.tools

distclean: clean
	rm -rf .venv
