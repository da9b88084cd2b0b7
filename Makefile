# `make demo` and `make test` are all a newcomer needs; both set up .venv first, once.
PYTHON ?= python3
VENV ?= .venv
# Where CPU builds of torch come from; left aside where it isn't reached.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# auto, cpu or cuda
BUILD ?= auto
# extra arguments of pytest, as in: make test ARGS="-k golden"
ARGS ?=

.PHONY: help setup demo test lint site clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 12

setup: ## make the virtual environment, if it isn't there
	@$(PYTHON) scripts/set_up.py --venv $(VENV) --torch-cpu-index "$(TORCH_CPU_INDEX)" --build $(BUILD)

demo: setup ## run the shipped model in a real engine and show its tokens by regime
	@$(VENV)/bin/vllm-entropix demo

# On a CPU Model Runner V2 runs with interpreted kernels, in a pytest of its own; status 5 is "nothing selected by ARGS".
test: setup ## run all tests
	@status=0; \
	if $(VENV)/bin/python -c "import sys, torch; sys.exit(torch.cuda.is_available())"; then \
	  ENTROPIX_TEST_RUNNER=v2 $(VENV)/bin/python -m pytest -m both_runners $(ARGS) || [ $$? -eq 5 ] || status=1; \
	fi; \
	$(VENV)/bin/python -m pytest $(ARGS) || status=$$?; \
	exit $$status

lint: setup ## ruff and mypy
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

site: setup ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
