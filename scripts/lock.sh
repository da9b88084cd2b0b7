#!/bin/sh
# Writes requirements/cpu.lock: what the CPU build needs for development, with the hashes of all files of each version.
# Versions that are in the lock stay; `scripts/lock.sh --upgrade` takes the newest, `--upgrade-package NAME` one of them.
set -eu
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND=scripts/lock.sh
exec .venv/bin/uv pip compile --quiet --config-file requirements/uv.toml --universal --python-version 3.11 \
    --extra cpu --extra dev --extra ray --extra report --no-emit-package torch \
    --generate-hashes --no-annotate --output-file requirements/cpu.lock "$@" pyproject.toml
