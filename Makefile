# FastSAM's commands. The first one sets up what it needs: .venv, the pinned dependencies, the compiled extension.
#
#   make test ARGS="-k native"        ARGS is passed to the program that runs
#   make demo PYTHON=python3.12       the interpreter for .venv
#   make test WORKERS=0               one process, which a debugger can stop; 2 by default
#   make test SAMPLE=300              also 300 of the tests that only make test-all runs, different ones each day
#   make compat PYTHON=python3.13 TORCH=2.13.0   the interpreter and the torch of the wheel's environment
#   make kernels QUICK=1              two dtypes, one GPU of each vendor, one Triton
#   make gpu-report OUT=report        with .venv's Python if there is one; PYTHON=python3: with that one, as it is
#   make gpu-report STAGE=measure     one of its two stages, measure and tests

PYTHON ?= python3
THREADS ?= 2
WORKERS ?= 2
MINUTES ?= 60
KILLS ?= 20
SAMPLE ?= 0
# Other releases of Triton that the kernels must compile with, besides the one in requirements/test.txt.
OTHER_TRITON ?= 3.6.0

BIN := .venv/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
REQUIRED := FASTSAM_REQUIRE_BACKENDS=reference,foreach,native,triton
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)
CUDA := $(wildcard csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/*.cpp csrc/cuda/*.h)
FORMATTED := $(CSRC) $(CUDA) $(wildcard tests/cuda_on_cpu/*.cpp tests/cuda_on_cpu/*.h)

# Runs a command; what it printed (a compiler's command lines) is shown if it fails.
define quietly
@mkdir -p build
@{ $(1); } > build/quietly.log 2>&1 || { cat build/quietly.log; exit 1; }
endef

# Marks that a part of the set-up is done; touched last, so that a failed part runs again.
DEPENDENCIES := .venv/.dependencies
PACKAGE := .venv/.package
EXTENSION := .venv/.extension
ON_CPU := build/cuda_on_cpu/.built

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo sharpness test test-all test-integrations bench gpu-report docs-tables kernels cuda fuzz crash sanitize \
  sanitize-cuda lint format wheel try-wheel docs compat clean

help:  ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

setup: $(EXTENSION) $(ON_CPU)  ## Only the set-up: .venv with all dependencies, the extension, what the tests compile

demo: $(EXTENSION)  ## Train with SGD and with FastSAM on noisy labels: a table and a picture
	@echo "training a small CNN with SGD and with FastSAM, 3 seeds each (about two minutes on two cores)"
	$(BIN)/python -m fastsam demo $(ARGS)

sharpness: $(EXTENSION)  ## How sharp the minima of SGD and FastSAM are: a table and a picture; ARGS="--m": other perturbations
	$(BIN)/python -m fastsam sharpness $(ARGS)

test: $(EXTENSION) $(ON_CPU)  ## The tests: every pair of backend, base, method, dtype, ...; in WORKERS=2 processes
	@echo "running the tests; all of them take 4 to 6 minutes on two cores"
	$(REQUIRED) $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal --sample $(SAMPLE) $(ARGS)

test-all: $(EXTENSION) $(ON_CPU)  ## All tests: every combination
	$(REQUIRED) $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal --thorough $(ARGS)

bench: $(EXTENSION)  ## The benchmarks, on the GPU or on THREADS=2 threads; ARGS="--device cpu"
	OMP_NUM_THREADS=$(THREADS) $(BIN)/pytest benchmarks/ --benchmark $(ARGS)

# Sets up and downloads nothing: the machine with the GPU must have what is needed. A dry run works on any machine.
OUT ?= build/gpu-report/report
IS_PYTHON_GIVEN := $(filter-out file,$(origin PYTHON))
REPORTING_PYTHON = $(if $(IS_PYTHON_GIVEN),$(PYTHON),$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)))

DRY_RUN_NEEDS := $(if $(DRY),$(if $(IS_PYTHON_GIVEN),,$(EXTENSION)))

gpu-report: $(DRY_RUN_NEEDS)  ## On an NVIDIA GPU, into OUT=folder; STAGE=measure or tests: one of both; DRY=1: tiny, on the CPU
	$(REPORTING_PYTHON) -m benchmarks.gpu_report --out $(OUT) $(if $(STAGE),--stage $(STAGE)) $(if $(DRY),--dry) $(ARGS)

docs-tables: $(PACKAGE)  ## The README's GPU table from benchmarks/results/; FROM=results.json: new ones; CHECK=1: only look
	$(BIN)/python -m benchmarks.docs $(if $(CHECK),--check) $(if $(FROM),--from $(FROM)) $(ARGS)

SANITIZED := build/sanitize/.extension

fuzz: $(EXTENSION)  ## Random programs on every backend, from new seeds, for MINUTES=60 together
	$(REQUIRED) FASTSAM_FUZZ_MINUTES=$(MINUTES) $(BIN)/pytest tests/properties/test_fuzz.py --capture=no $(ARGS)

crash: $(EXTENSION)  ## Kill a training run KILLS=20 times: it must end like an undisturbed run, bit for bit
	$(BIN)/python tools/crash.py --kills $(KILLS) $(ARGS)

# The sanitizer's runtime must be loaded first, together with the C++ library, whose exceptions it intercepts. Leak
# detection is off: Python and torch do not free everything at exit.
sanitize: $(SANITIZED)  ## The native backend's tests under AddressSanitizer and UBSan
	PYTHONPATH=$(dir $(SANITIZED)) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  FASTSAM_REQUIRE_BACKENDS=native $(BIN)/pytest --numprocesses $(WORKERS) --capture=sys --timeout 600 -k "(native or signature) and not cuda" $(ARGS)

# A release that cannot be installed is left out; the last line printed names the ones that were used.
kernels: $(PACKAGE)  ## Compile the Triton kernels for every GPU, without one; a table; QUICK=1: a part
ifndef QUICK
	for version in $(OTHER_TRITON); do \
	  test -d build/triton/$$version || \
	  $(BIN)/python $(PIP_INSTALL) --no-deps --target build/triton/$$version triton==$$version || \
	  rm -rf build/triton/$$version; \
	done
endif
	$(BIN)/python tools/compile_kernels.py \
	  $(if $(QUICK),--quick,$(addprefix --triton build/triton/,$(OTHER_TRITON))) $(ARGS)

cuda: $(EXTENSION)  ## Compile the CUDA kernels with nvcc, without a GPU; a table; FASTSAM_CUDA_ARCHS=90: one GPU's
	@echo "compiling csrc/ with nvcc (about ten minutes on two cores, for all GPUs)"
	$(call quietly,FASTSAM_BUILD=cuda $(BIN)/python setup.py --quiet build_ext --inplace)
	$(BIN)/python tools/inspect_cuda.py fastsam/_C_cuda.abi3.so

# Without PyTorch's caching allocator, an access behind an allocation is detected.
sanitize-cuda:  ## The CUDA kernels under compute-sanitizer, on a machine with a GPU, after make cuda
	for tool in memcheck racecheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTSAM_REQUIRE_BACKENDS=native:cuda compute-sanitizer --tool $$tool \
	    --target-processes all --error-exitcode 1 $(BIN)/pytest -m gpu -k native --timeout 0 $(or $(ARGS),tests/operations) || exit 1; \
	done

lint: $(DEPENDENCIES)  ## Formatting, ruff and mypy; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(DEPENDENCIES)  ## Format everything in place
	$(BIN)/clang-format -i $(FORMATTED)
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

wheel: $(DEPENDENCIES)  ## The sdist and the manylinux_2_28 wheel, checked, in dist/; TWICE=1: and built again; QUICK=1: with the set-up's objects
	tools/wheel.sh $(if $(TWICE),--twice) $(if $(QUICK),--quick)

test-integrations: $(EXTENSION)  ## FastSAM in Lightning, Transformers, Accelerate, timm, fastai, ...: a table; about 3 minutes
	tools/test_integrations.sh --numprocesses $(WORKERS) $(ARGS)

docs: $(EXTENSION)  ## The pages, into build/docs/html; runs their code; BROWSE=1: looks at them with headless Chromium
	tools/docs.sh $(if $(BROWSE),--browse)

# An environment with the wheel and nothing of .venv. A release of torch may download gigabytes of CUDA;
# TORCH=2.11.0+cpu is a CPU build, where pip is configured to find these.
COMPAT = .compat/$(shell $(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2])')-torch$(TORCH)

try-wheel:  ## The wheel in dist/ in a new environment: make try-wheel PYTHON=python3.13 TORCH=2.13.0; doctor, a training
	@test -n "$(TORCH)" || { echo "make $@: which torch? make $@ TORCH=2.11.0" >&2; exit 2; }
	test -d $(COMPAT) || $(PYTHON) -m venv $(COMPAT)
	$(COMPAT)/bin/python $(PIP_INSTALL) torch==$(TORCH) numpy dist/*.whl || \
	  { echo "make $@: the wheel and torch $(TORCH) could not be installed (pip's reason is above)" >&2; exit 1; }
	$(COMPAT)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps dist/*.whl
	cd $(COMPAT) && bin/fastsam --version && bin/fastsam doctor && bin/python $(CURDIR)/tools/try_wheel.py native

# The suite runs in its own folder, so that the installed fastsam is tested, not the checkout's. Triton is installed
# without its dependencies checked: torch pins another release of it, and pip would replace torch.
compat:  ## The wheel, built and tried, and its tests with another torch: make compat TORCH=2.11.0
	@test -n "$(TORCH)" || { echo "make $@: which torch? make $@ TORCH=2.11.0" >&2; exit 2; }
	$(MAKE) --no-print-directory wheel QUICK=1
	$(MAKE) --no-print-directory try-wheel
	grep -v ^triton== requirements/test.txt | $(COMPAT)/bin/python $(PIP_INSTALL) torch==$(TORCH) -r /dev/stdin
	grep ^triton== requirements/test.txt | $(COMPAT)/bin/python $(PIP_INSTALL) --no-deps -r /dev/stdin
	rm -rf $(COMPAT)/suite && mkdir $(COMPAT)/suite && cp -r tests pyproject.toml $(COMPAT)/suite
	cd $(COMPAT)/suite && $(REQUIRED) ../bin/pytest --numprocesses $(WORKERS) $(ARGS)

clean:  ## Remove what make made
	rm -rf .venv .venvs .compat build dist *.egg-info fastsam/*.so .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(DEPENDENCIES): requirements/dev.txt requirements/test.txt
	@echo "setting up .venv (about a minute, the first time)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP_INSTALL) -r requirements/dev.txt
	@touch $@

# Only installs the link to this checkout; the next rule compiles, and only what has changed.
$(PACKAGE): $(DEPENDENCIES) pyproject.toml setup.py
	@FASTSAM_BUILD=none $(BIN)/python $(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@

$(EXTENSION): $(PACKAGE) $(CSRC)
	@echo "compiling csrc/ (about two minutes on two cores, the first time)"
	$(call quietly,FASTSAM_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --inplace)
	@touch $@

$(ON_CPU): $(DEPENDENCIES) $(CSRC) $(CUDA) $(wildcard tests/cuda_on_cpu/*.*)
	@echo "compiling csrc/cuda/ for the CPU, for the tests (half a minute)"
	$(call quietly,$(BIN)/python -m tests.cuda_on_cpu)
	@touch $@

# A package of its own, which precedes the checkout's on PYTHONPATH.
$(SANITIZED): $(DEPENDENCIES) setup.py $(CSRC) $(wildcard fastsam/*.py fastsam/*/*.py kernels/*.py)
	@echo "compiling csrc/ with sanitizers"
	$(call quietly,FASTSAM_BUILD=sanitize $(BIN)/python setup.py --quiet build \
	  --build-temp build/sanitize/objects --build-lib build/sanitize)
	@touch $@
