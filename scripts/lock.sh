#!/bin/sh
# Writes requirements/cpu.lock: what the CPU build needs for development, with the hashes of all files of each version; and, from
# it, requirements/image.lock.
# Versions that are in the lock stay; `scripts/lock.sh --upgrade` takes the newest, `--upgrade-package NAME` one of them.
set -eu
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND=scripts/lock.sh
compile=".venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate"
$compile --config-file requirements/uv.toml --extra bench --extra cpu --extra dev --extra docs --extra ray --extra report --no-emit-package torch \
    --output-file requirements/cpu.lock "$@" pyproject.toml
image=$(printf 'hatchling\ntomli-w\nwrapt\n' | $compile --no-header --no-emit-package packaging --constraint requirements/cpu.lock -)
{
    echo "# For deploy/docker/Dockerfile: what builds the project, and what vLLM's image may lack of its requirements. As in cpu.lock."
    echo "$image"
} > requirements/image.lock
