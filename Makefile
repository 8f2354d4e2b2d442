# `make demo` and `make test` need make and Python 3.11 or newer; each creates .venv.
# Choose an interpreter with `make demo PYTHON=python3.12`, pass options on with `make test ARGS="-k scan"`.

SUITABLE = import sys; sys.exit(sys.version_info < (3, 11))
CANDIDATES = python3 python3.13 python3.12 python3.11 python3.14 python
# The first interpreter that is new enough: on a Mac, plain python3 is often Apple's 3.9.
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(SUITABLE)' >/dev/null 2>&1 && echo $$p && break; done)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: help docs demo reproduce test test-cuda test-cuda-sanitizer lint bench-cuda bench-metal browser-runtime clean
.NOTPARALLEL:

help:
	@echo "make demo   pretrain, finetune and compare a small ARM in two to three minutes, and write a report"
	@echo "make reproduce   test the findings of the paper on digits, with intervals over 5 seeds (40 minutes)"
	@echo "make test   lint, type-check and run the tests, as the continuous integration does"
	@echo "make docs   build the documentation's site in site/"
	@echo "make lint   only ruff and mypy"
	@echo "make test-cuda   with an NVIDIA GPU: the Triton kernels' tests on it; installs nothing"
	@echo "make test-cuda-sanitizer   the same tests under compute-sanitizer"
	@echo "make bench-cuda  with an NVIDIA GPU: the scan and training steps against mamba-ssm, as JSON and Markdown"
	@echo "make bench-metal  on a Mac: the Metal scan against plain MLX, and training steps, as JSON"
	@echo "make browser-runtime  with npm: fetch onnxruntime-web for the pages of arm export --browser"
	@echo "make clean  remove .venv and the caches"
	@echo
	@echo "Variables: PYTHON (the interpreter for .venv), ARGS (more options for arm demo, pytest or the benchmark)"

# About 40 minutes on 2 CPU cores. The folder `reproduction` holds the runs; the same command resumes.
reproduce: $(VENV)/reproduce.installed
	$(BIN)/python benchmarks/reproduce.py $(ARGS)

demo: $(VENV)/demo.installed
	$(BIN)/arm demo $(ARGS)

# Waiting OpenMP threads would otherwise take the cores that other workers need.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs.installed
	$(BIN)/python -m mkdocs build --strict

# A machine with a GPU often has its own torch: PYTHON is used if it has torch, else the Python of .venv.
CUDA_PYTHON = $(shell for p in $(PYTHON) $(BIN)/python; do \
  $$p -c 'import numpy, pytest, torch, triton' >/dev/null 2>&1 && echo $$p && break; done)
WITH_CUDA_PYTHON = p="$(CUDA_PYTHON)"; [ -n "$$p" ] || { \
  echo "make $@ needs torch, triton, numpy and pytest; pass an interpreter that has them, PYTHON=..."; exit 2; }; \
  PYTHONPATH=.:backends/cuda

test-cuda:
	@$(WITH_CUDA_PYTHON); export PYTHONPATH; \
	  $$p -c 'import xdist' 2>/dev/null && workers="-n 12"; \
	  ARM_LONG_TESTS=1 $$p -m pytest -W default $$workers -m "not sanitizer" -k "not compiled_model_trains" \
	  tests/cuda tests/torch_engine/test_torch_scan.py tests/torch_engine/test_torch_execution.py \
	  tests/engine/test_golden_engines.py tests/engine/test_engine_steps.py $(ARGS)

# The three tools run in parallel; each takes minutes.
test-cuda-sanitizer:
	@$(WITH_CUDA_PYTHON); export PYTHONPATH; \
	  $$p -c 'import xdist' 2>/dev/null && workers="-n 3"; \
	  $$p -m pytest -W default $$workers -m sanitizer tests/cuda $(ARGS)

# Peers are built from their sdists in peers/ (pip download --no-deps mamba-ssm causal-conv1d) if nvcc is installed.
bench-cuda:
	@$(WITH_CUDA_PYTHON) $$p benchmarks/cuda_kernels.py --sweep
	@$(WITH_CUDA_PYTHON) $$p benchmarks/cuda_scan.py $(ARGS)
	@$(WITH_CUDA_PYTHON) $$p benchmarks/cuda_step.py $(ARGS)

bench-metal: $(VENV)/test.installed
	$(BIN)/python benchmarks/metal.py $(ARGS)

# The web pages of `arm export` contain onnxruntime-web (MIT), which is too large for the repository. This puts
# its files into the package; a wheel that is built afterwards contains them.
WEB := onnxruntime-web@1.30.0
WEB_SHA512 := ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61
VENDOR := convert/arm_convert/browser/vendor

browser-runtime:
	@command -v npm >/dev/null || { echo "make $@ needs npm, which comes with Node.js"; exit 2; }
	rm -rf $(VENDOR) && mkdir -p $(VENDOR)
	cd $(VENDOR) && npm pack --silent $(WEB)
	@cd $(VENDOR) && $(PYTHON) -c 'import hashlib, pathlib, sys; \
	  sys.exit(hashlib.sha512(next(pathlib.Path().glob("*.tgz")).read_bytes()).hexdigest() != "$(WEB_SHA512)")' \
	  || { rm -rf $(CURDIR)/$(VENDOR); echo "$(WEB) is not the file that this Makefile expects"; exit 2; }
	cd $(VENDOR) && tar xzf *.tgz --strip-components 1 package/package.json package/README.md \
	  package/dist/ort.wasm.bundle.min.mjs package/dist/ort-wasm-simd-threaded.wasm && rm *.tgz

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/pyvenv.cfg:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "arm-vision needs Python 3.11 or newer, and none of $(CANDIDATES) is."; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 2; fi
	@$(PYTHON) -c '$(SUITABLE)' || { \
	  echo "arm-vision needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) could not create $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 2; }

# On Apple silicon the package installs MLX. On Linux it installs torch, and the extra adds MLX's small CPU
# build, so that the demo can compare the two.
$(VENV)/demo.installed: pyproject.toml constraints.txt $(VENV)/pyvenv.cfg
	$(INSTALL) '.[mlx,onnx]'
	@touch $@

$(VENV)/reproduce.installed: pyproject.toml constraints.txt $(VENV)/pyvenv.cfg
	$(INSTALL) '.[probe]'
	@touch $@

# The development extra contains everything that the demo needs.
$(VENV)/test.installed: pyproject.toml constraints.txt $(VENV)/pyvenv.cfg
	$(INSTALL) '.[dev]'
	@# Without its requirements: torchvision requires another torch, and the tests replace it by a stand-in.
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --constraint constraints.txt timm
	@touch $(VENV)/demo.installed $@

$(VENV)/docs.installed: pyproject.toml constraints.txt $(VENV)/pyvenv.cfg
	$(INSTALL) '.[docs]'
	@touch $@
