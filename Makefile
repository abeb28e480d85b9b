# `make demo` and `make test` work in a fresh clone: both make .venv first, if it is missing.
# ENGINE=gpu installs the CUDA build of vLLM, ENGINE=cpu the CPU build. The default is gpu where
# nvidia-smi is installed.
ENGINE ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
SYSTEM_PYTHON ?= python3
PYTHON := .venv/bin/python
AIRFLOW_PYTHON := .venv-airflow/bin/python
# vLLM: a KV cache of 1 GiB on a CPU, and no telemetry.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-models test-kill simulate test-airflow test-cluster gpu-check gpu-bench gpu-compile fuzz lint types \
	types-airflow lock clean airflow airflow-setup

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## make .venv, or repair it
	@$(SYSTEM_PYTHON) scripts/setup_venv.py .venv requirements/$(ENGINE).lock --editable

demo: setup  ## the whole pipeline in minutes: train a base, dump it with vLLM, train two students, compare
	$(PYTHON) scripts/quickstart.py --output runs/demo

PROCESSES ?= 2
test: setup  ## all tests except Airflow's and the long ones, in PROCESSES processes
	$(PYTHON) -m pytest -n $(PROCESSES) -m "not long"

test-kill: setup  ## kill a dump 450 times, also with a second live writer, and compare all rows; then the long tests
	$(PYTHON) -m tests.helpers.kills --kills 200
	$(PYTHON) -m tests.helpers.kills --kills 50 --positions 0.3
	$(PYTHON) -m tests.helpers.kills --kills 200 --codec v3
	$(PYTHON) -m pytest -m long

simulate: setup  ## a month of a dump by 1,000 preempted workers, on a virtual clock; takes minutes
	PYTHONPATH=. $(PYTHON) scripts/benchmarks/simulate_month.py

test-models: setup  ## every family of models through the whole pipeline; writes pipeline/models/SUPPORTED.md
	$(PYTHON) -m tests.helpers.matrix --table

GPU_CHECK := $(if $(LIST),--list) $(if $(ONLY),--only "$(ONLY)") $(if $(REHEARSE),--rehearse)
gpu-check: setup  ## check this machine's GPU in minutes; LIST=1 lists, ONLY=name, REHEARSE=1 runs on the CPU
	$(PYTHON) -m tests.gpu $(GPU_CHECK)

test-fast: setup  ## only the fast tests, which do not start vLLM
	$(PYTHON) -m pytest -n $(PROCESSES) -m "not slow and not vllm and not long"

FUZZ_SECONDS ?= 60
.venv-fuzz:
	@$(SYSTEM_PYTHON) -m venv .venv-fuzz
	@.venv-fuzz/bin/pip install -q atheris numpy numba pyarrow zstandard fsspec

fuzz: setup .venv-fuzz  ## forged dumps for FUZZ_SECONDS, then damaged bytes for the decoders as long
	PYTHONPATH=. $(PYTHON) tests/fuzz/fuzz_dump.py --seconds $(FUZZ_SECONDS)
	PYTHONPATH=. .venv-fuzz/bin/python tests/fuzz/fuzz_decode.py runs/fuzz tests/fuzz/corpus \
		-max_total_time=$(FUZZ_SECONDS)

gpu-bench: setup  ## loss, step, head and attention on a GPU, in minutes; LIST=1 lists, PART=loss runs one part
	$(PYTHON) scripts/benchmarks/gpu_bench.py $(if $(LIST),--list) $(addprefix --part ,$(PART))

gpu-compile: setup  ## registers, spills and shared memory of the kernels on three GPUs; needs none of them
	PYTHONPATH=. $(PYTHON) scripts/benchmarks/gpu_compile.py

lint: setup  ## check rules and format with ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: setup  ## check types with mypy
	$(PYTHON) -m mypy

# Airflow has an environment of its own; its tasks start the interpreter of .venv.
airflow-setup:  ## make Airflow's environment, .venv-airflow, or repair it
	@$(SYSTEM_PYTHON) scripts/setup_venv.py .venv-airflow requirements/airflow.lock

airflow: setup airflow-setup  ## run Airflow on this machine: http://127.0.0.1:8080 (see deploy/README.md)
	@deploy/local.sh

test-airflow: setup airflow-setup  ## Airflow's tests, with a real scheduler and kills
	MOL_DISTILL_PYTHON=$(abspath $(PYTHON)) $(AIRFLOW_PYTHON) -m pytest \
		--confcutdir tests/airflow -o norecursedirs=".*" tests/airflow

# The hosts of the cluster are network namespaces, which need root. The tests say so where it lacks.
ALONE := $(if $(filter 0,$(shell id -u)),unshare --net --mount-proc --fork --kill-child --pid)
test-cluster: setup airflow-setup  ## two hosts with Celery, Redis and PostgreSQL; one is cut off in mid-dump
	MOL_DISTILL_PYTHON=$(abspath $(PYTHON)) $(ALONE) $(AIRFLOW_PYTHON) -m pytest \
		--confcutdir tests/cluster -o norecursedirs=".*" tests/cluster

types-airflow: airflow-setup  ## check the types of the DAGs with mypy, in Airflow's environment
	MYPYPATH=pipeline/dags $(AIRFLOW_PYTHON) -m mypy --config-file= --python-version 3.11 \
		--explicit-package-bases pipeline/dags/distill.py

# torchvision, torchaudio and torchcodec exist for CUDA only, and break a CPU vLLM when present.
# TORCH_LINKS, a folder or an index page, has the CPU build of torch.
TORCH_LINKS ?= $(PIP_FIND_LINKS)
COMPILE := uv pip compile pyproject.toml --python-version 3.11 --no-header --no-annotate \
	--extra train --extra s3 --extra tasks
lock:  ## resolve requirements/*.lock again (needs uv)
	$(COMPILE) --extra cpu --extra dev $(if $(TORCH_LINKS),--find-links $(TORCH_LINKS)) \
		$(foreach name,torchvision torchaudio torchcodec,--no-emit-package $(name)) \
		--output-file requirements/cpu.lock
	$(COMPILE) --extra gpu --python-platform x86_64-manylinux_2_28 \
		--output-file requirements/gpu.lock
	uv pip compile requirements/airflow.in --python-version 3.11 --no-header --no-annotate \
		--output-file requirements/airflow.lock

clean:  ## remove everything that was made here, with .venv and runs/
	rm -rf .venv .venv-* build runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
