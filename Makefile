# make demo    set everything up and train a language model on the plays of Shakespeare
# make demo-translate    the same for a translator from English to French: two minutes of training
# make test    set everything up and run the tests
# make bench   set everything up, with the peers that are measured against, and run all benchmarks
# make cuda-check    compile the CUDA kernels for all targets, and show what each takes of the device
# make gpu     on a machine with a GPU, with what PYTHON has there: build, test on the GPU and measure, without a network
# make lint    ruff, mypy --strict, clang-format
#
# All but gpu and cuda-check work in .venv, made at the first call. TORCH=2.14.1 and the like choose another torch, PYTHON another interpreter.

PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# Named after the torch: another one is another installation and another build.
INSTALLED := $(VENV)/.installed-torch-$(TORCH)
BUILT := $(VENV)/.built-torch-$(TORCH)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc bench tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test cuda-check gpu demo demo-translate bench lint format clean
.DELETE_ON_ERROR:

build: $(BUILT)

$(INSTALLED): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-* $(VENV)/.built-*
	$(PIP) install --quiet --constraint constraints.txt torch==$(TORCH) setuptools wheel ninja pybind11 lightning-fabric \
	    matplotlib numpy sacrebleu safetensors tokenizers tqdm clang-format hypothesis mypy pytest ruff
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -c "import llm_ext; print('llm_ext is built:', llm_ext.build_info())"
	touch $@

test: $(BUILT)
	$(BIN)/python -m pytest $(PYTEST)

cuda-check:
	$(PYTHON) tests/cuda_check.py

# torch with CUDA, nvcc of the same CUDA, g++; and of Python packages, besides those that torch needs:
GPU_NEEDS := setuptools wheel ninja pybind11 numpy pytest hypothesis
GPU_TESTS := tests/test_lengths.py tests/test_ops.py tests/test_layers.py tests/test_additive_attention.py tests/test_cuda.py

# Measured whatever the tests say, or if they hang: such a machine is not always at hand.
gpu:
	@$(PYTHON) -c "import importlib.util, sys; \
	    missing = [n for n in '$(GPU_NEEDS)'.split() if importlib.util.find_spec(n) is None]; \
	    sys.exit('make gpu needs, of Python packages: ' + ' '.join(missing) if missing else None)"
	LLM_EXT_CUDA=1 $(PYTHON) -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --editable .
	$(PYTHON) -c "import llm_ext; print('llm_ext is built:', llm_ext.build_info())"
	timeout 300 $(PYTHON) -m pytest -rs --durations=5 -k cuda $(GPU_TESTS) $(PYTEST); tested=$$?; \
	    $(PYTHON) -m bench --device cuda $(BENCH) --json && exit $$tested

demo: $(BUILT)
	$(BIN)/python examples/shakespeare/demo.py $(DEMO)

demo-translate: $(BUILT)
	$(BIN)/python examples/translation/demo.py $(DEMO)

bench: $(BUILT)
	$(PIP) install --quiet --constraint constraints.txt jax onnx onnxruntime openvino
	$(BIN)/python -m bench $(if $(BENCH),$(BENCH),all)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(BUILT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info llm_ext/*.so
