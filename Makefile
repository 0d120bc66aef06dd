# Two commands, each doing all of its own set-up: `make quickstart` and `make test`.
# VENV=dir uses or creates another virtual environment, PYTHON=exe another interpreter,
# TORCH="torch==X [pip options]" another torch (only where VENV has none: an installed torch is never replaced).
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
PY = $(VENV)/bin/python

.PHONY: quickstart test lint gpu gpu-rivals gpu-rehearsal clean

$(VENV)/.vrpo-installed: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install -U "setuptools>=77" wheel ninja
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PY) -m pip install --no-build-isolation -e ".[test]"
	touch $@

quickstart: $(VENV)/.vrpo-installed
	$(PY) -m examples.quickstart --output_dir runs/quickstart

test: $(VENV)/.vrpo-installed
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
	$(PY) -m pytest

lint: $(VENV)/.vrpo-installed
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

# A bare CUDA machine is enough: system Python, no network, nothing installed (see benchmarks/gpu.py). Takes about
# nine minutes.
# GPU="--seconds 300 --stages tests,kernels --output DIR" passes options.
GPU ?=
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

# Other packages from a folder of wheels (see benchmarks/gpu_rivals.py), for a machine without network.
gpu-rivals:
	@test -n "$(WHEELS)" || { echo "make gpu-rivals WHEELS=DIR, a folder with *.whl files"; exit 2; }
	$(PYTHON) -m benchmarks.gpu_rivals --wheels "$(WHEELS)" $(GPU)

# All stages on a CPU, in Triton's interpreter: every line runs, the figures mean nothing.
gpu-rehearsal: $(VENV)/.vrpo-installed
	$(PY) -m benchmarks.gpu --tiny --output runs/gpu-rehearsal

clean:
	rm -rf build *.egg-info vrpo_kernels/*.so
