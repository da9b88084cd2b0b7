# `make demo` and `make test` are all a newcomer needs; both set up .venv first, once.
PYTHON ?= python3
VENV ?= .venv
# Where CPU builds of torch come from; left aside where it isn't reached.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# auto, cpu or cuda
BUILD ?= auto
# what `make demo` runs: a name of tools.real_models or its beginning, as smollm2, a folder or a hub's name
MODEL ?=
# extra arguments of pytest, as in: make test ARGS="-k golden"
ARGS ?=
# Tests that run side by side, on a CPU: one a core, up to four
WORKERS ?= logical

# A file's tests share engines and servers. The order is that of tests/conftest.py, not by the number of tests in a file.
side_by_side = -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder
on_a_gpu = $(VENV)/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"

.PHONY: help setup demo test test-fast lint site clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 12

setup: ## make the virtual environment, if it isn't there
	@$(PYTHON) scripts/set_up.py --venv $(VENV) --torch-cpu-index "$(TORCH_CPU_INDEX)" --build $(BUILD)

demo: setup ## run the shipped model, or MODEL, in a real engine and show its tokens by regime
	@if [ -z "$(MODEL)" ]; then exec $(VENV)/bin/vllm-entropix demo; fi; \
	model=$$($(VENV)/bin/python -m tools.real_models --or-as-given "$(MODEL)") && exec $(VENV)/bin/vllm-entropix demo --model "$$model"

# On a CPU Model Runner V2 runs with interpreted kernels, in a pytest of its own; status 5 is "nothing selected by ARGS".
# On a GPU one test at a time has its memory. The second pass has the tests that are held to a time: they run alone.
test: setup ## run all tests
	@if $(on_a_gpu); then exec $(VENV)/bin/python -m pytest $(ARGS); fi; \
	status=0; \
	ENTROPIX_TEST_RUNNER=v2 $(VENV)/bin/python -m pytest -m both_runners $(side_by_side) $(ARGS) || [ $$? -eq 5 ] || status=1; \
	$(VENV)/bin/python -m pytest -m alone $(ARGS) || [ $$? -eq 5 ] || status=1; \
	$(VENV)/bin/python -m pytest -m "not alone" $(side_by_side) $(ARGS) || [ $$? -eq 5 ] || status=1; \
	exit $$status

# test_routes.py installs vLLM and torch anew.
# Interpreting and compiling kernels for a GPU takes a core for minutes.
test-fast: setup ## run the tests that start no engine, install nothing and compile nothing for a GPU
	@status=0; \
	$(VENV)/bin/python -m pytest -m "alone and not engine and not gpu" $(ARGS) || [ $$? -eq 5 ] || status=1; \
	$(VENV)/bin/python -m pytest -m "not alone and not engine and not gpu" --ignore tests/test_routes.py \
		--ignore tests/kernels/test_triton.py --ignore-glob "tests/kernels/test_machine_code_*.py" $(side_by_side) $(ARGS) \
		|| [ $$? -eq 5 ] || status=1; \
	exit $$status

lint: setup ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

site: setup ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
