# `make demo` and `make test` need python3 (3.11 or newer), pip and make, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LINE := $(shell $(PYTHON) -c 'import sys; print(f"py{sys.version_info[0]}{sys.version_info[1]}")')
# A Python line without a constraints file of its own gets whatever the registry resolves to.
PINS := $(wildcard constraints/$(LINE).txt)
# glibc asks the kernel anew for the memory of every step's arrays; with huge pages that costs little.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(PINS))

.PHONY: demo evidence test lint types suite docs test-slow test-compile test-newest test-old-sdk test-others test-beam test-gpu bench gpu clean

demo: $(VENV)/.runtime
	$(BIN)/reverie demo

# Hours; it resumes, and writes docs/evidence.md. `make evidence EVIDENCE=--quick` takes a quarter of an hour.
EVIDENCE ?=
evidence: $(VENV)/.runtime
	$(BIN)/reverie scenes evidence runs/evidence$(if $(findstring --quick,$(EVIDENCE)),-quick --quick,--page docs)

test: lint types suite

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# Two workers, a file to a worker: fixtures and compiled programs are shared within a file.
suite: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Warnings are errors (`strict: true` in mkdocs.yml). The site is in build/site.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Long runs are worth compiling well; the suite is not (tests/conftest.py).
test-slow: $(VENV)/.test
	XLA_FLAGS=--xla_force_host_platform_device_count=4 $(BIN)/python -m pytest -m slow

# XLA's compilers for GPUs and TPUs need no such chip, but several GB: an environment of their own.
CUDA := $(if $(filter py311,$(LINE)),cuda12,cuda13)
test-compile:
	test -x $(VENV)-compile/bin/python || $(PYTHON) -m venv $(VENV)-compile
	$(VENV)-compile/bin/python -m pip install --quiet --editable '.[test,$(CUDA),tpu]'
	XLA_FLAGS= $(VENV)-compile/bin/python -m pytest -m compile tests/compile

# The suite with what the registry has today, on another Python line; nothing is pinned.
NEWEST_PYTHON ?= python3.12
test-newest:
	$(MAKE) suite PYTHON=$(NEWEST_PYTHON) VENV=$(VENV)-newest PINS=

# google-generativeai pins an older protobuf than TFDS needs: an environment of its own.
test-old-sdk:
	test -x $(VENV)-old/bin/python || $(PYTHON) -m venv $(VENV)-old
	$(VENV)-old/bin/python -m pip install --quiet --editable '.[google-generativeai]' pytest hypothesis beartype
	$(VENV)-old/bin/python -m pytest tests/hosted/test_google_generativeai.py

# Exports opened by other releases of transformers, each in an environment that holds nothing of this project.
OTHERS := 4.37.2 4.57.6 newest
test-others: $(VENV)/.test $(OTHERS:%=$(VENV)-others/%/.installed)
	$(BIN)/python -m pytest -m others tests/others

$(VENV)-others/%/.installed: constraints/others.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/others.txt \
	  $(if $(filter newest,$*),--upgrade transformers,transformers==$*) torch pillow jinja2 sentencepiece protobuf accelerate
	touch $@

# Apache Beam excludes releases that the suite is pinned to: an environment of its own.
test-beam:
	test -x $(VENV)-beam/bin/python || $(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/python -m pip install --quiet $(addprefix --constraint ,$(wildcard constraints/beam-$(LINE).txt)) \
	  --editable '.[beam]' pytest hypothesis beartype
	$(VENV)-beam/bin/python -m pytest tests/beam

test-gpu: $(VENV)/.test
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -m gpu

# One command for a machine with a GPU and no registry: `benchmarks/gpu_wheels.sh` gathers what it lacks beforehand.
gpu:
	test -x $(VENV)-gpu/bin/python || $(PYTHON) -m venv --system-site-packages $(VENV)-gpu
	$(VENV)-gpu/bin/python -m pip install --quiet --no-index --find-links wheels --no-deps \
	  $$(ls wheels | sed 's/-[0-9].*//')
	$(VENV)-gpu/bin/python -m benchmarks.gpu --out gpu.json --budget 480

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.tree_step
	$(BIN)/python -m benchmarks.evaluate --images 40 --peer-images 1

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml $(PINS) | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(PINS) | $(VENV)/bin/python
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.runtime

$(VENV)/.docs: pyproject.toml $(PINS) | $(VENV)/bin/python
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
