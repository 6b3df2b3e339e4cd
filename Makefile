# `make bench` and `make test` need nothing but Python 3.10+, a C++ compiler and make; the first of them creates .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
OUT ?= results
DEVICE ?= cuda
# of `make gpu`: which parts, all if empty; and seconds
ONLY ?=
BUDGET ?= $(if $(ONLY),200,360)
# other Pythons that `make package` also tries the wheel with, such as "python3.10 python3.13"
PACKAGE_PYTHONS ?=
# the machine that `make gpu-carry` prepares for
GPU_PYTHON ?= python3.12
GPU_ARCH ?= 90
GPU_VENV ?= .venv-gpu
GPU_PACKAGES ?= torch==2.11.0 triton==3.6.0 numpy==2.5.* pybind11 ninja pytest pytest-xdist hypothesis typer rich
# where OUT is not given, benchmarks/results/<device>
GPU_OUT = $(if $(filter file,$(origin OUT)),,--out $(OUT))
# Only the architecture of the GPU that is here, or one to test the build with; wheels have them all.
CUDA_ARCHS := $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u),90)

.DEFAULT_GOAL := help
.PHONY: help setup test arm soak fuzz crashes trained bench gpu gpu-carry kernels roofline readme lint wheel package clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

setup: $(VENV)/.ready  ## create .venv with torch, every extra, and fastcnn in editable mode

$(VENV)/.ready: pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --upgrade pip setuptools wheel ninja $(TORCH)
	FASTCNN_BUILD_CPP=1 FASTCNN_CUDA_ARCHS="$${FASTCNN_CUDA_ARCHS:-$(CUDA_ARCHS)}" \
		$(BIN)/pip install --quiet --no-compile --no-build-isolation -e '.[bench,test,dev]' $(TORCH)
	touch $@

# The threads of one process wait without spinning, which would keep the others from running.
test arm soak crashes: export OMP_WAIT_POLICY := passive
test arm: PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses 8
test: setup  ## run the whole test suite
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter

arm: setup  ## test the C++ kernels on an emulated ARM machine; Debian's g++-aarch64-linux-gnu and qemu-user are needed
	$(PYTEST) tests/arm

soak: setup  ## make 100,000 calls of all sizes from threads that come and go: do memory and caches stay bounded?
	$(BIN)/python -m tools.soak

fuzz: setup  ## break 2,000 small ONNX files: each must be refused, or compute what onnxruntime computes
	$(BIN)/python -m tools.fuzz

crashes: setup  ## kill a training of the whole AlexNet again and again: does it end with the same bits? MODEL=
	$(BIN)/python -m tools.crashes --model $(or $(MODEL),alexnet) --width 1 --input-size 227 --epochs 2

trained: setup  ## with trained weights, on labelled photographs, which are downloaded: is as much recognized as with torch?
	FASTCNN_DOWNLOAD=1 $(BIN)/python -m pytest -q tests/models/test_trained.py

bench: setup  ## check kernels and AlexNet on photographs, time them beside PyTorch, write results/
	$(BIN)/fastcnn bench kernels --input photographs --quick --out $(OUT)
	$(BIN)/fastcnn bench models --quick --out $(OUT)

gpu:  ## with the active python3, which has torch: test and measure on the GPU here, in BUDGET seconds, into OUT
	started=$$(date +%s) && \
	FASTCNN_CUDA_ARCHS="$${FASTCNN_CUDA_ARCHS:-$(CUDA_ARCHS)}" python3 -m tools.gpu.carry install && \
	python3 -m tools.gpu --started $$started --budget $(BUDGET) --device $(DEVICE) --only "$(ONLY)" $(GPU_OUT)

gpu-carry: $(GPU_VENV)/bin/python  ## compile what `make gpu` will need on another machine, into .gpu, to be taken there
	$(GPU_VENV)/bin/python -m tools.gpu.carry make --arch $(GPU_ARCH)

$(GPU_VENV)/bin/python:
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$@ -m pip install --quiet --upgrade pip setuptools wheel
	$@ -m pip install --quiet $(GPU_PACKAGES)

kernels: setup  ## compile every kernel for A100, H100 and B200, and write docs/kernels.md
	$(BIN)/python -m tools.machine_code.kernels_table docs/kernels.md

roofline: setup  ## predict how fast the memory-bound kernels are on H100 and H200, and write docs/roofline.md
	$(BIN)/python -m tools.machine_code.roofline

readme: setup  ## write the README's tables of figures, from benchmarks/results
	$(BIN)/python -m tools.readme

lint: setup  ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

wheel: setup  ## build the source distribution, and from it a wheel, into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

package: wheel  ## install both, each where there is nothing else, and run an operator in C++
	$(BIN)/python -m tools.package dist --torch "$(TORCH)" $(PACKAGE_PYTHONS:%=--python %)

clean:  ## remove everything that make made
	rm -rf $(VENV) $(GPU_VENV) .gpu build dist results *.egg-info fastcnn/*.so fastcnn/kernels
