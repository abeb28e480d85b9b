# `make demo` and `make test` do everything from a fresh clone; both make .venv first, once.
# ENGINE=gpu takes the CUDA build of vLLM; the default is what this machine has.
ENGINE ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
SYSTEM_PYTHON ?= python3
PYTHON := .venv/bin/python
# vLLM on two cores: a small KV cache, no telemetry, no model hub.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-kill test-fast lint types lock clean

help:  ## show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## make .venv, or repair it
	@$(SYSTEM_PYTHON) scripts/setup_venv.py .venv requirements/$(ENGINE).lock --editable

demo: setup  ## the whole job in minutes: train a base, dump it with vLLM, train two students, compare
	$(PYTHON) scripts/quickstart.py --output runs/demo

test: setup  ## every test but Airflow's and the long ones
	$(PYTHON) -m pytest -m "not long"

test-kill: setup  ## kill one dump 200 times, also with a second writer alive, and compare every row
	$(PYTHON) -m tests.pipeline.kills --kills 200
	$(PYTHON) -m pytest -m long

test-fast: setup  ## the tests that start no engine and take no time
	$(PYTHON) -m pytest -m "not slow and not vllm and not long"

lint: setup  ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: setup  ## mypy
	$(PYTHON) -m mypy

# torchvision, torchaudio and torchcodec exist for CUDA only and break a CPU vLLM when present.
# The CPU build of torch comes from where TORCH_LINKS says (a folder or an index page).
TORCH_LINKS ?= $(PIP_FIND_LINKS)
COMPILE := uv pip compile pyproject.toml --python-version 3.11 --no-header --no-annotate \
	--extra train --extra s3
lock:  ## resolve requirements/*.lock again (needs uv)
	$(COMPILE) --extra cpu --extra dev $(if $(TORCH_LINKS),--find-links $(TORCH_LINKS)) \
		$(foreach name,torchvision torchaudio torchcodec,--no-emit-package $(name)) \
		--output-file requirements/cpu.lock
	$(COMPILE) --extra gpu --python-platform x86_64-manylinux_2_28 \
		--output-file requirements/gpu.lock

clean:  ## remove what was built, .venv and runs/ included
	rm -rf .venv .venv-* build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
