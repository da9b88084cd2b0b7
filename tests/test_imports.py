"""What may import what: nothing heavy in vLLM's processes, vLLM in the engine only, arrows that never point back."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vllm_entropix

PACKAGE = Path(vllm_entropix.__file__).parent
ROOT = PACKAGE.name
HEAVY = ("torch", "vllm", "numpy", "pydantic", "transformers", "triton")

# The rooms, from the ground up: what the modules of each may import of the package, beside their own room. Nothing may import
# a room that stands above it, so there is no cycle between rooms.
SETTINGS = {"settings", "_version"}
MAY_IMPORT = {
    "settings": {"_version"},
    "records": SETTINGS,
    "forks": SETTINGS | {"records"},
    "kernels": SETTINGS,
    "distribution": SETTINGS | {"kernels"},
    "attention": SETTINGS | {"kernels", "distribution"},
    "samplers": SETTINGS | {"records", "kernels", "distribution"},
    "rows": SETTINGS | {"records", "kernels", "distribution", "samplers"},
}
WITHOUT_VLLM = (*MAY_IMPORT, "observability", "bench")


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names that a module's source imports anywhere in it: in functions, and for type checkers only, too.

    ``from a import b`` gives a.b, which is a module or a name in one.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            # import_module("vllm") and __import__("vllm") hide nothing.
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)


def modules(folder: str) -> list[tuple[str, Path]]:
    """(dotted name, file) of a folder's modules, or of the one module of that name."""
    paths = [PACKAGE / f"{folder}.py"] if (PACKAGE / f"{folder}.py").exists() else sorted((PACKAGE / folder).rglob("*.py"))
    named = []
    for path in paths:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        named.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return named


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """(module, what it imports) for every import in a folder."""
    for module, path in modules(folder):
        for name in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            yield module, name


def loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules after ``statement`` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    # -P: the working directory is no place to import from.
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


# --- what an import loads ---------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy():
    # vLLM loads plugins in every process it starts.
    loaded = loaded_by("import vllm_entropix")
    assert ROOT in loaded
    assert not loaded & set(HEAVY)


def test_the_entry_point_loads_nothing_heavy():
    assert not loaded_by("import vllm_entropix.engine.plugin") & set(HEAVY)


@pytest.mark.parametrize("module", ["vllm_entropix.config", "vllm_entropix.samplers.request"])
def test_importing_the_settings_loads_neither_torch_nor_vllm(module):
    loaded = loaded_by(f"import {module}")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "vllm", "numpy"}


@pytest.mark.parametrize("module", ["vllm_entropix.sampling", "vllm_entropix.attention", "vllm_entropix.rows.batch"])
def test_importing_the_science_does_not_load_vllm(module):
    loaded = loaded_by(f"import {module}")
    assert "torch" in loaded
    assert "vllm" not in loaded


def test_asking_for_the_shipped_model_loads_no_terminal():
    # Ray replicas do, and workers.
    assert not loaded_by("from vllm_entropix.demo_model import shipped_model") & {*HEAVY, "typer", "rich"}


def test_public_names_are_there_and_load_what_they_need():
    for name in vllm_entropix.__all__:
        assert getattr(vllm_entropix, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'entropy'"):
        vllm_entropix.entropy  # noqa: B018
    assert not loaded_by("from vllm_entropix import EntropixConfig, ConfigError") & {"torch", "vllm"}


# --- who imports whom -------------------------------------------------------------------------------------------------


def test_imports_are_found_wherever_they_stand():
    source = """
import os, vllm.config as c
from . import filters
from ..engine import worker
if TYPE_CHECKING:
    from vllm_entropix.config import EntropixConfig
def late():
    from vllm.v1 import sample
    importlib.import_module("vllm.platforms")
    __import__("numpy")
"""
    assert sorted(imports(source, "vllm_entropix.distribution.metrics")) == [
        "numpy",
        "os",
        "vllm.config",
        "vllm.platforms",
        "vllm.v1.sample",
        "vllm_entropix.config.EntropixConfig",
        "vllm_entropix.distribution.filters",
        "vllm_entropix.engine.worker",
    ]
    assert list(imports("from . import filters", "vllm_entropix.distribution", is_package=True)) == [
        "vllm_entropix.distribution.filters"
    ]


def test_the_folders_are_found():
    assert {"vllm_entropix.rows", "vllm_entropix.samplers.entropix.sampler"} <= {
        module for folder in ("rows", "samplers") for module, _ in modules(folder)
    }
    assert ("vllm_entropix.distribution.attention", "vllm_entropix.distribution.statistics.LN2") in set(
        imported("distribution")
    )
    assert [module for module, _ in modules("config")] == ["vllm_entropix.config"]


@pytest.mark.parametrize("folder", WITHOUT_VLLM)
def test_vllm_is_not_imported(folder):
    assert [(module, name) for module, name in imported(folder) if name.split(".")[0] == "vllm"] == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_no_arrow_points_back(folder):
    forbidden = []
    for module, name in imported(folder):
        parts = name.split(".")
        # The package's public names are lazy: they'd hide where an arrow points.
        if parts[0] == ROOT and (len(parts) == 1 or parts[1] not in MAY_IMPORT[folder] | {folder}):
            forbidden.append((module, name))
    assert forbidden == []


def arrows() -> dict[str, set[str]]:
    """Module of the package → those that it imports anywhere in it: late, and for type checkers only, too."""
    found: dict[str, set[str]] = {module: set() for module, _ in modules("")}
    for module, name in imported(""):
        # A name in a module is an import of the module.
        while name and name not in found:
            name = name.rpartition(".")[0]
        if name and name != module:
            found[module].add(name)
    return found


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(arrows()).prepare()  # raises, and names the modules of a circle
