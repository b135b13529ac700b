# Everything that a developer or a machine does here is a target; each does its own set-up, in virtual environments
# below this folder. Needs Python 3.11 or newer and make. Another Python: make PYTHON=/path/to/python3.12 test

PYTHON ?= python3
VENV ?= .venv
PROTO_VENV ?= .venv-proto
FLOOR_VENV ?= .venv-floor
BENCH_VENV ?= .venv-bench
TORCH_VENV ?= .venv-torch
GPU_VENV ?= .venv-gpu
PYTEST_ARGS ?=
BENCH_ARGS ?=
PARTS ?=
GPU_EXTRA ?= cuda13
EXTRAS := server,cli,bfloat16,onnx,otel

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/demo.stamp ## start a server, send it the worked example and a photograph, write a PNG, stop it
	$(VENV)/bin/python examples/demo.py

.PHONY: test
test: $(VENV)/test.stamp ## run the whole test suite (PYTEST_ARGS='-k stream' for a part)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

.PHONY: test-floor
test-floor: $(FLOOR_VENV)/test.stamp ## run the quick tests on the lowest supported versions of the dependencies
	$(FLOOR_VENV)/bin/python -m pytest -m 'not slow and not containers and not torch' $(PYTEST_ARGS)

.PHONY: test-containers
test-containers: $(VENV)/test.stamp ## on a Docker engine (installed and started where it may be): image, compose, the SDK against them
	tests/containers/engine-up
	TESTCONTAINERS_RYUK_DISABLED=true $(VENV)/bin/python -m pytest -m containers tests/containers $(PYTEST_ARGS)

# Of one backend: the others are held to the same reference as it is by `make test`.
.PHONY: test-torch
test-torch: export CONVSERVICE_TEST_BACKENDS = numpy
test-torch: $(TORCH_VENV)/torch-test.stamp ## every layer beside PyTorch, and networks taken from it
	$(TORCH_VENV)/bin/python -m pytest -m torch tests/torch $(PYTEST_ARGS)

.PHONY: test-install
test-install: $(VENV)/test.stamp ## install the plain wheel elsewhere and call a server with it
	tools/check-install $(PYTHON) $(VENV)

.PHONY: test-gpu
test-gpu: $(GPU_VENV)/test-gpu.stamp ## on a GPU: the suite, every kernel form, compute-sanitizer (PARTS='suite forms')
	PYTHON=$(GPU_VENV)/bin/python tools/test-gpu $(PARTS)

.PHONY: gate
gate: $(VENV)/test.stamp ## compile the CUDA kernels that changed, and a sample: no spills, registers as recorded
	$(VENV)/bin/python -m tools.kernel_gate

.PHONY: gate-full
gate-full: $(VENV)/test.stamp ## the same for every kernel and architecture
	$(VENV)/bin/python -m tools.kernel_gate --full

.PHONY: gate-update
gate-update: $(VENV)/test.stamp ## record in tools/kernels.txt what the kernels take now
	$(VENV)/bin/python -m tools.kernel_gate --update

.PHONY: lint
lint: $(VENV)/lint.stamp ## ruff: rules and format
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

.PHONY: format
format: $(VENV)/lint.stamp ## ruff: mend what it can, and format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

.PHONY: types
types: $(VENV)/lint.stamp $(VENV)/test.stamp ## mypy --strict and pyright
	$(VENV)/bin/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

.PHONY: proto
proto: $(PROTO_VENV)/proto.stamp ## generate client/convservice/v1 from the contract
	tools/generate-proto $(PROTO_VENV) client

.PHONY: proto-check
proto-check: $(PROTO_VENV)/proto.stamp ## demand that the generated code is up to date and that the contract keeps buf's rules
	tools/check-proto $(PROTO_VENV)

.PHONY: bench-stream
bench-stream: $(VENV)/demo.stamp ## stream 4 GiB through a server and print its memory and the first row's delay
	$(VENV)/bin/python -m benchmarks.stream

.PHONY: bench-convolution
bench-convolution: $(BENCH_VENV)/bench.stamp ## time the backends beside PyTorch, each result validated first
	MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=67108864 OPENBLAS_NUM_THREADS=1 \
		$(BENCH_VENV)/bin/python -m benchmarks.convolution

.PHONY: bench-container
bench-container: $(VENV)/test.stamp ## build the image; its size, the time to its first answer, its idle memory
	tests/containers/engine-up
	$(VENV)/bin/python -m benchmarks.container $(BENCH_ARGS)

.PHONY: bench-gpu
bench-gpu: $(BENCH_VENV)/bench-gpu.stamp ## on a GPU: every algorithm beside cuDNN, each result validated first; then the other layers
	status=0; $(BENCH_VENV)/bin/python -m benchmarks.gpu $(BENCH_ARGS) || status=1; \
		$(if $(BENCH_ARGS),,$(BENCH_VENV)/bin/python -m benchmarks.gpu_others || status=1;) exit $$status

.PHONY: bench-gpu-others
bench-gpu-others: $(BENCH_VENV)/bench-gpu.stamp ## on a GPU: the layers beside the convolution, beside PyTorch
	$(BENCH_VENV)/bin/python -m benchmarks.gpu_others $(BENCH_ARGS)

.PHONY: dev
dev: $(VENV)/dev.stamp ## set up everything for an editor, and the commit hooks
	$(VENV)/bin/pre-commit install

.PHONY: clean
clean: ## remove caches and what builds and the demo wrote
	rm -rf build dist demo-output .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## remove the virtual environments as well
	rm -rf $(VENV) $(PROTO_VENV) $(FLOOR_VENV) $(BENCH_VENV) $(TORCH_VENV) $(GPU_VENV)

# A stamp FOLDER/GROUP.stamp says that the environment holds the project, editable, and that dependency group.
$(VENV)/bin/python $(PROTO_VENV)/bin/python $(FLOOR_VENV)/bin/python $(BENCH_VENV)/bin/python $(TORCH_VENV)/bin/python $(GPU_VENV)/bin/python:
	tools/make-venv $(PYTHON) $(@:/bin/python=)

# What runs the tests has the emulator too, a distribution of its own.
$(VENV)/%.stamp: $(VENV)/bin/python pyproject.toml tests/emulator/pyproject.toml
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[$(EXTRAS)]' $(if $(filter test dev,$*),--editable tests/emulator) --group $*
	@touch $@

$(TORCH_VENV)/torch-test.stamp: $(TORCH_VENV)/bin/python pyproject.toml tests/emulator/pyproject.toml
	$(TORCH_VENV)/bin/python $(PIP_INSTALL) --editable '.[$(EXTRAS)]' --editable tests/emulator --group torch-test
	@touch $@

$(BENCH_VENV)/bench.stamp: $(BENCH_VENV)/bin/python pyproject.toml
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) --editable '.[$(EXTRAS)]' --group bench
	@touch $@

# Where the driver speaks CUDA 12: make GPU_EXTRA=cuda12 test-gpu, and bench-gpu
$(BENCH_VENV)/bench-gpu.stamp: $(BENCH_VENV)/bin/python pyproject.toml
	$(BENCH_VENV)/bin/python $(PIP_INSTALL) --editable '.[$(EXTRAS),$(GPU_EXTRA)]' --group bench --group demo
	@touch $@

# Not the group `test`: that holds one compiler of CUDA 13, and CuPy for it. The sanitizer of cuda12 is not executable.
SANITIZER_cuda13 := nvidia-cuda-sanitizer-api==13.0.*
SANITIZER_cuda12 := nvidia-cuda-sanitizer-api-cu12==12.9.*
$(GPU_VENV)/test-gpu.stamp: $(GPU_VENV)/bin/python pyproject.toml
	$(GPU_VENV)/bin/python $(PIP_INSTALL) --editable '.[$(EXTRAS),$(GPU_EXTRA)]' --group demo \
		hypothesis ml_dtypes pytest pytest-timeout scipy '$(SANITIZER_$(GPU_EXTRA))'
	find $(GPU_VENV) -name compute-sanitizer -exec chmod +x {} +
	@touch $@

$(PROTO_VENV)/proto.stamp: $(PROTO_VENV)/bin/python pyproject.toml
	$(PROTO_VENV)/bin/python $(PIP_INSTALL) --group proto
	@touch $@

$(FLOOR_VENV)/test.stamp: $(FLOOR_VENV)/bin/python pyproject.toml tests/emulator/pyproject.toml tools/lowest_versions.py
	$(FLOOR_VENV)/bin/python tools/lowest_versions.py pyproject.toml > $(FLOOR_VENV)/constraints.txt
	$(FLOOR_VENV)/bin/python $(PIP_INSTALL) --editable '.[$(EXTRAS)]' --editable tests/emulator --group test --constraint $(FLOOR_VENV)/constraints.txt
	@touch $@
