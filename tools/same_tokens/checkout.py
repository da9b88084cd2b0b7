"""The code whose tokens are recorded: that of any checkout, whatever is installed."""

from __future__ import annotations

import hashlib
import os
import tomllib
from pathlib import Path

from tests.support import runners
from tools.same_tokens.parts import Part

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_entropix"
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # requests are all there before the first step, and so batches are the same
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
}


class CheckoutError(Exception):
    """A folder that has no code of this project; the message is for the user."""


def digest(checkout: Path) -> str:
    """SHA-256 of the package's code and presets."""
    package = checkout / PACKAGE
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".toml"))
    if not files or not (checkout / "pyproject.toml").is_file():
        raise CheckoutError(f"{checkout} is no checkout of this project: it has no {PACKAGE} or no pyproject.toml")
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.relative_to(package)}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


def install(checkout: Path, folder: Path) -> None:
    """Make the package importable from ``folder``, and nothing else of the checkout, as if it were installed there.

    vLLM finds a plugin by its entry point, and the one that is installed may name a module that the checkout hasn't.
    """
    (folder / PACKAGE).symlink_to((checkout / PACKAGE).resolve())
    project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    metadata = folder / f"{PACKAGE}-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def environment(part: Part, folder: Path) -> dict[str, str]:
    """The environment of a part's process, which imports the package from ``folder`` and the rest from here."""
    made = runners.environment(part.runner)
    made = {name: value for name, value in made.items() if not name.startswith("VLLM_") or name in runners.V2_ONLY}
    path = [str(folder), str(ROOT), *filter(None, made["PYTHONPATH"].split(os.pathsep))]
    made |= QUIET | {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
    if part.engine.get("tensor_parallel_size", 1) > 1:
        # Spawned, so that workers load plugins themselves. A CPU each.
        first, second, *_ = sorted(os.sched_getaffinity(0))
        made |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    return made
