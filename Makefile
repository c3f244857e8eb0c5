# make demo   set up, build, and train a Split-CNN on real images (about 3 minutes after the set-up)
# make test   set up, build, and run all tests
# make build  set up and build only
# make gpu-evidence   tests, sanitizer and benchmarks on this machine's GPU, about 8 minutes, into bench/results/
#
# Needs Python 3.11 or 3.12, make and a C++20 compiler; with nvcc (CUDA_HOME, or on the PATH) the CUDA kernels are
# built too. Everything is installed into .venv in this folder and nowhere else.

# The first Python that runs and will do: a version manager may have put a name on the PATH that does not run.
find_python = for name in python3.12 python3.11 python3; do \
    if $$name -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1; \
    then echo $$name; break; fi; done
PYTHON ?= $(shell $(find_python))

# torch and torchvision are a pair: this one is tested to import together, also on a machine without a GPU.
VENV := .venv
TORCH := 2.11.0
TORCHVISION := 0.26.0

# The other end of the supported range: takes the wheel built beside TORCH, without building.
NEWEST_TORCH := 2.13.0
NEWEST_VENV := .venv-torch-$(NEWEST_TORCH)

DEMO_OUT := demo-output
DEMO_ARGS := --compare --out $(DEMO_OUT)
TESTS := tests
PYTEST_ARGS :=
# Processes that share the tests, each with one thread; TEST_JOBS=0 runs them in pytest's own.
TEST_JOBS := $(shell jobs=$$(nproc); echo $$((jobs < 8 ? jobs : 8)))
EVIDENCE_ARGS :=

# Neither a PYTHONPATH nor packages of the user's may stand in for what the environment lacks.
unexport PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE := 1

set_up = @if [ -z "$(PYTHON)" ]; then \
    echo "splitkern needs Python 3.11 or 3.12 with its venv module, and found none on the PATH: make PYTHON=/path/to/python3.12" >&2; \
    exit 1; fi; $(PYTHON) scripts/set_up_environment.py

NATIVE := $(VENV)/bin/python setup.py -q build_ext --inplace

.PHONY: build demo test gpu-evidence test-newest wheel lint format clean help
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# Stamps are written last, and anew whenever what they depend on changes.
$(VENV)/.set-up: pyproject.toml Makefile scripts/set_up_environment.py
	$(set_up) $(VENV) torch==$(TORCH) torchvision==$(TORCHVISION) --build-requirements --extra demo --extra test --extra lint
	@touch $@

# Editable: an edited Python file needs nothing, an edited C++ or CUDA file `make build`.
$(VENV)/.installed: $(VENV)/.set-up setup.py splitkern/_version.py
	@echo "==> building the native library (some minutes the first time with nvcc)"
	@$(NATIVE)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input --no-build-isolation --no-deps -e .
	@touch $@

build: $(VENV)/.installed
	@$(NATIVE)

demo: build
	$(VENV)/bin/splitkern train $(DEMO_ARGS)

test test-newest: export OMP_NUM_THREADS := 1
test test-newest: export OMP_WAIT_POLICY := passive
pytest_in_parallel = bin/pytest -n $(TEST_JOBS) --dist loadgroup

test: build
	SPLITKERN_REQUIRE_TORCHVISION=1 $(VENV)/$(pytest_in_parallel) $(PYTEST_ARGS) $(TESTS)

# Resumable: EVIDENCE_ARGS=--resume. FULL=1 takes every layer. Where nothing can be installed, NO_VENV=1 uses PYTHON as
# it is (torch, pytest): make gpu-evidence NO_VENV=1 PYTHON=python3
gpu-evidence: $(if $(NO_VENV),,build)
	$(if $(NO_VENV),$(PYTHON),$(VENV)/bin/python) scripts/gpu_evidence.py $(if $(FULL),--full) $(EVIDENCE_ARGS)

wheel: build
	@rm -rf dist
	@$(VENV)/bin/python -m pip wheel -qq --disable-pip-version-check --no-input --no-build-isolation --no-deps -w dist .
	@ls dist

$(NEWEST_VENV)/.set-up: pyproject.toml Makefile scripts/set_up_environment.py
	$(set_up) $(NEWEST_VENV) torch==$(NEWEST_TORCH) --extra test
	@touch $@

# Runs the installed wheel, not this folder's sources, which `append` puts last on sys.path. Without the tests that
# compile C++: neither the kernels on the CPU nor the memory library depend on the version of torch.
test-newest: wheel $(NEWEST_VENV)/.set-up
	@$(NEWEST_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input --no-index --no-deps --force-reinstall dist/*.whl
	$(NEWEST_VENV)/$(pytest_in_parallel) --import-mode=append --ignore=tests/host_execution --ignore=tests/memory/test_native.py -o cache_dir=.pytest_cache/newest \
	    $(PYTEST_ARGS) $(TESTS)

NATIVE_SOURCES = $(shell find csrc tests bench \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' \) -print)

lint: $(VENV)/.set-up
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE_SOURCES)

format: $(VENV)/.set-up
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE_SOURCES)

# Leaves the environments: remove .venv* by hand to set up anew.
clean:
	rm -rf build dist splitkern.egg-info splitkern/_ops.so $(VENV)/.installed $(DEMO_OUT)
