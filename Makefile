# Each target makes the environment it needs, in .venv-<name>, from the wheel that is built here.
#
#   PYTHON=python3.13 make test        another Python (3.10 or newer)
#   make test ARGS='-k fork -x'        arguments to pytest, or to `fastnorm demo`
#   make test JOBS=0                   in one process, as --pdb wants it; else in so many
#   FASTNORM_BUILD_...=1 make test     switches of the build: see setup.py

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
# Libraries to compare with. `make bench` goes on without those that cannot be installed.
PEERS = torch==2.13.0 onnx onnxruntime numba

ABI := $(shell $(PYTHON) -c 'import sys, sysconfig; \
	print(sysconfig.get_config_var("SOABI") if sys.version_info >= (3, 10) else "")')
ifeq ($(ABI),)
$(error PYTHON=$(PYTHON): Python 3.10 or newer is needed)
endif
# What one wheel differs in from another: stamps carry it, so that no other wheel is taken for it.
BUILD := $(ABI)-$(FASTNORM_BUILD_OPENMP)-$(FASTNORM_BUILD_WERROR)-$(FASTNORM_BUILD_SANITIZE)-$(FASTNORM_BUILD_COVERAGE)
SOURCES := $(wildcard pyproject.toml setup.py README.md LICENSE \
	fastnorm/*.py fastnorm/*.pyi fastnorm/*.pyx fastnorm/*.px[di] fastnorm/py.typed \
	fastnorm/cuda/*.py src_c/*.[ch])

.PHONY: help demo test test-gpu bench readme check format wheel sanitize clean
.PRECIOUS: .venv-%/.python-$(ABI)

help:
	@echo 'make demo      the main job: layer norm beside batch norm in a network that learns to read digits'
	@echo 'make test      the tests, against the built wheel'
	@echo 'make test-gpu  the tests that need a CUDA device'
	@echo 'make bench     this machine, beside NumPy, torch, onnxruntime and numba'
	@echo 'make readme    write the measured numbers into README.md'
	@echo 'make check     formatting, lint, types'
	@echo 'make format    put the formatting right'
	@echo 'make sanitize  the tests under the address and undefined-behaviour sanitizers'
	@echo 'make wheel     the wheel, in dist/'
	@echo 'make clean     remove all that these have made'

# python -I and the pytest script keep the source tree off the path: what runs is what was installed.

demo: .venv-demo/.installed-$(BUILD)
	.venv-demo/bin/python -I -m fastnorm demo $(ARGS)

test: .venv-test/.installed-$(BUILD)
	$(TEST_ENVIRONMENT) .venv-test/bin/pytest --numprocesses=$(JOBS) --dist=loadfile \
		--no-loadscope-reorder $(ARGS)

# Beside the packages of the machine: torch, CuPy and Numba's CUDA parts go with its driver.
test-gpu: .venv-gpu/.installed-$(BUILD)
	.venv-gpu/bin/python -I -m pytest --gpu $(ARGS)

bench: .venv-bench/.installed-$(BUILD) .venv-bench/.peers-$(ABI)
	.venv-bench/bin/python -I -m fastnorm bench
	.venv-bench/bin/pytest bench --benchmark-only $(ARGS)

readme: .venv-bench/.installed-$(BUILD) .venv-bench/.peers-$(ABI)
	.venv-bench/bin/python bench/readme.py $(ARGS)

C_SOURCES = $(wildcard src_c/*.[ch] tests/c/*.[ch] tests/cuda/*.c bench/*.c bench/*.cpp)

check: .venv-check/.installed-$(BUILD)
	.venv-check/bin/ruff format --check .
	.venv-check/bin/ruff check .
	.venv-check/bin/mypy
	PATH=.venv-check/bin:$$PATH cython-lint fastnorm
	.venv-check/bin/clang-format --dry-run -Werror $(C_SOURCES)

format: .venv-check/.installed-$(BUILD)
	.venv-check/bin/ruff format .
	.venv-check/bin/ruff check --fix .
	.venv-check/bin/clang-format -i $(C_SOURCES)

sanitize:
	$(MAKE) test FASTNORM_BUILD_SANITIZE=address,undefined TEST_ENVIRONMENT='PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$(shell $(CC) -print-file-name=libasan.so)'

wheel: dist/.$(BUILD)
	@ls dist/*.whl

clean:
	rm -rf .venv-build .venv-demo .venv-test .venv-gpu .venv-bench .venv-check build dist *.egg-info
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

# ---- environments -------------------------------------------------------------------------------

# Files that left the package would stay in build/lib and go into the wheel.
dist/.$(BUILD): .venv-build/.python-$(ABI) $(SOURCES)
	rm -rf dist build/lib.* build/bdist.*
	.venv-build/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	touch $@

.venv-%/.python-$(ABI):
	$(PYTHON) -m venv --clear .venv-$*
	touch $@

.venv-gpu/.python-$(ABI):
	$(PYTHON) -m venv --clear --system-site-packages .venv-gpu
	touch $@

# The environment's name is that of the extra it gets.
.venv-%/.installed-$(BUILD): .venv-%/.python-$(ABI) dist/.$(BUILD)
	rm -f .venv-$*/.installed-*
	.venv-$*/bin/python -m pip uninstall --quiet --quiet --yes fastnorm-kernels
	.venv-$*/bin/python -m pip install --quiet "$$(echo dist/*.whl)[$*]"
	touch $@

.venv-bench/.peers-$(ABI): | .venv-bench/.installed-$(BUILD)
	for peer in $(PEERS); do .venv-bench/bin/python -m pip install --quiet --prefer-binary \
		"$$peer" || echo "bench goes on without $$peer"; done
	touch $@
