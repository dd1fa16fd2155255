# Every target installs what it needs. On a fresh machine `make demo` and `make test` work at once.

VENV  ?= .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
CUDA_VENV ?= .venv-cuda
# `make demo RUNS=/scratch/runs`: results go there instead of runs/.
ifdef RUNS
export SEAL_RUNS := $(if $(filter /% ~%,$(RUNS)),$(RUNS),$(CURDIR)/$(RUNS))
endif
# Notebooks run in a copy of the project, which has a runs/ folder of its own, apart from the user's runs.
FRESH_NOTEBOOKS := if [ -L build ]; then echo "make: build is a link, and nothing behind it is removed; remove the link" >&2; \
	exit 1; fi; rm -rf build/notebooks build/runs && mkdir -p build/notebooks && cp pyproject.toml build/ && \
	cp notebooks/*.ipynb build/notebooks/
LINT  := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.DEFAULT_GOAL := help
.PHONY: help demo check test lab kernel docs bench vllm-env cuda-env cuda-check lint notebooks clean

help:
	@echo "make demo       notebooks 01 to 06 and 08 on the small model and shipped passages (about 15 minutes on 2 cores)"
	@echo "make check      ruff, mypy and the fast tests (under 3 minutes on 2 cores)"
	@echo "make test       ruff, mypy, all tests and all notebooks"
	@echo "make lab        JupyterLab at the tour (LAB_FLAGS=... for jupyter lab)"
	@echo "make kernel     register this environment as a kernel for another JupyterLab"
	@echo "make docs       the documentation site, in build/docs"
	@echo "make bench      speed on this machine: inner loop (17 minutes), server, its scale, graders, engines, continual edits, inspector"
	@echo "make vllm-env   vLLM for a machine without a GPU, in $(VLLM_VENV) (for tests/vllm and engine=vllm)"
	@echo "make cuda-check the CUDA path without a GPU, in $(CUDA_VENV) (about 2 minutes on 2 cores; the first time 5 GB)"
	@echo "make lint       ruff and mypy"
	@echo "make notebooks  run the committed notebooks again and show what changed"
	@echo "make clean      remove $(VENV), if make made it, and caches (never runs/)"

demo: $(STAMP)
	@$(BIN)/seal-nb demo

# What to run while you write code. Tests marked `slow` are left out (tests/conftest.py says which).
check: $(STAMP)
	@$(LINT) && $(BIN)/python -m pytest -q -n 2 -m "not slow" tests

# One pytest runs everything, so that its last line counts everything. It has three processes on two cores, since a
# third of the tests mostly wait (tests/conftest.py).
test: $(STAMP)
	@$(LINT); lint=$$?; \
	$(FRESH_NOTEBOOKS); \
	$(BIN)/python -m pytest -n 3 tests build/notebooks \
		--nbval-lax --nbval-cell-timeout=900; tests=$$?; \
	if [ $$lint -ne 0 ]; then echo "make test: ruff or mypy failed, see the top" >&2; exit 1; fi; \
	exit $$tests

# With the settings in lab/, JupyterLab opens the tour and does not ask for news, updates or extensions.
lab: $(STAMP)
	@JUPYTER_CONFIG_PATH="$(CURDIR)/lab" $(BIN)/jupyter lab $(LAB_FLAGS)

kernel: $(STAMP)
	@$(BIN)/python -m ipykernel install --user --name seal-nb --display-name "Python (seal-nb)"

docs: $(STAMP)
	@$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.inner_loop
	@$(BIN)/python -m benchmarks.service_load
	@$(BIN)/python -m benchmarks.scale
	@$(BIN)/python -m benchmarks.grading
	@$(BIN)/python -m benchmarks.engines
	@$(BIN)/python -m benchmarks.continual
	@$(BIN)/python -m benchmarks.inspector

# A vLLM for machines without a GPU, in an environment of its own; tests/vllm starts its server from it.
vllm-env:
	@.ci/vllm.sh "$(VLLM_VENV)"

# torch for CUDA, in an environment of its own, which needs no GPU.
cuda-env:
	@.ci/cuda.sh "$(CUDA_VENV)"

# Operations, types, waits and memory of the CUDA path on tensors without values, and the Triton kernels.
cuda-check: cuda-env
	@CUDA_VISIBLE_DEVICES= "$(CUDA_VENV)/bin/python" -m pytest -q -n 2 tests/cuda_check

lint: $(STAMP)
	@$(LINT)

notebooks: $(STAMP)
	@$(FRESH_NOTEBOOKS)
	@for notebook in build/notebooks/*.ipynb; do \
		echo "$$(basename $$notebook)"; \
		$(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level=ERROR \
			--ExecutePreprocessor.record_timing=False $$notebook || exit 1; \
	done
	@$(BIN)/jupyter nbconvert --coalesce-streams --log-level=ERROR build/notebooks/*.ipynb
	@cp build/notebooks/*.ipynb notebooks/
	@git --no-pager diff --stat -- notebooks

clean:
	@if [ -e "$(VENV)/.made-for-seal-nb" ] || [ -e "$(STAMP)" ]; then rm -rf -- "$(VENV)"; \
	else echo "make: $(VENV) is kept, because .ci/venv.sh did not make it"; fi
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find seal_nb tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that the next make continues an interrupted installation.
$(STAMP): pyproject.toml
	@python=""; \
	for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			python=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "make: no Python 3.11 or newer found; python3 is: $$(python3 --version 2>&1)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "Making $(VENV) with $$($$python --version) (once)"; \
		.ci/venv.sh $$python $(VENV) || { \
			echo "make: $$python made no virtual environment; on Debian: apt install python3-venv" >&2; \
			exit 1; }; \
	fi
	@echo "Installing into $(VENV) (some minutes the first time; again only when pyproject.toml changes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)
