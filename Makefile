# make demo    install, then the whole pipeline on the embedded data; run it again and it continues or does nothing
# make test    all tests          make lint    ruff and mypy          make clean    remove what runs left behind
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

.PHONY: demo test lint clean install

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

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(TEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

# Keeps data/, artifacts/, the DVC cache and the environment: what took time to make. `git clean -xfd` removes all.
clean:
	-@test -x $(BIN)/longview && $(BIN)/longview down
	rm -rf .work/logs .work/prefect .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
