"""What this package's sources use of vLLM, read from their syntax: imported names, and attributes of vLLM's objects.

Most of vLLM's objects have no type here, since they exist in an engine alone. So two things count as theirs: attributes of
variables known to hold one, followed through assignments, loops and calls; and attributes of anything whose name neither this
package defines nor a library that the file imports.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import types
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import numpy as np
import torch

import vllm_entropix

PACKAGE = Path(vllm_entropix.__file__).parent
VLLM = Path(util.find_spec("vllm").origin).parent
FOLDERS = ("engine", "attention", "cli")
# Where every attribute of an unknown name is taken for vLLM's. sources.py reads syntax trees, and knows no engine.
CLOSE = ("engine", "attention")
APART = "engine/sources.py"
# Libraries whose objects these files get of others, without importing them.
_ALWAYS = ("logging", "pydantic.main", "torch.distributed")
# Variables, parameters and attributes of ours that hold an object of vLLM's, by the file they do so in.
HOLDERS = {
    "engine/adapter.py": ("runner", "vllm_config", "scheduler_output", "request", "params", "group", "groups", "pipeline"),
    "engine/admission.py": ("processor", "params"),
    "engine/patches.py": ("self", "vllm_config"),
    "engine/calibrated.py": ("vllm_config", "model"),
    "engine/carrier.py": ("output", "result"),
    "engine/clarification.py": ("vllm_config",),
    "engine/decided.py": ("processor", "branch", "completion", "_state", "state"),
    "engine/finalise.py": ("vllm_config", "parallel", "scheduler"),
    "engine/forkable.py": ("vllm_config", "params", "model", "parallel"),
    "engine/forks.py": ("request", "params", "root", "state", "parent", "output", "completion", "result"),
    "engine/gate.py": ("vllm_config", "model", "parallel", "envs"),
    "engine/http.py": ("serving",),
    "engine/frontend.py": ("output", "state", "completion", "result"),
    "engine/pipeline.py": ("runner", "intermediate_tensors", "received", "output", "group"),
    "engine/resolved.py": ("vllm_config",),
    "engine/runner_v1.py": ("runner", "scheduler_output", "sampler"),
    "engine/runner_v2.py": ("runner", "context", "ctx", "sampling_params", "_slots", "slots", "_prefill_length"),
    "engine/scheduler.py": ("scheduler_output", "model_runner_output", "output", "outputs", "result"),
    "engine/shared_blocks.py": ("scheduler", "manager", "request", "parent", "group", "block"),
    "engine/worker.py": ("worker", "runner"),
    "attention/observer.py": ("layer", "impl", "module", "builder", "common_attn_metadata", "metadata"),
    "attention/layouts.py": ("layer",),
    "cli/calibrate.py": ("llm",),
    "cli/demo.py": ("llm",),
    "cli/doctor.py": ("plain",),
}
# Names of tensors, arrays, containers and modules, as which vLLM's objects end.
_PLAIN = {name for kind in (torch.Tensor, torch.nn.Module, np.ndarray, dict, list, str, set, bytes, type) for name in dir(kind)}
_OF_DICTIONARIES = set(dir(dict))


@functools.cache
def _names_of(module: str) -> frozenset[str]:
    """Names that a library's module and its classes have."""
    found = importlib.import_module(module)
    classes = [value for value in vars(found).values() if inspect.isclass(value)]
    return frozenset(dir(found)).union(*(dir(one) for one in classes))


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported() -> dict[str, set[str]]:
    """vLLM's module → names that are imported from it."""
    found: dict[str, set[str]] = {}
    for _, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                folder = VLLM.joinpath(*node.module.split(".")[1:])
                for alias in node.names:
                    if (folder / f"{alias.name}.py").is_file():
                        found.setdefault(f"{node.module}.{alias.name}", set())
                    else:
                        found.setdefault(node.module, set()).add(alias.name)
    return found


@functools.cache
def attributes() -> dict[str, set[str]]:
    """Attribute of an object of vLLM's → the files that use it."""
    found: dict[str, set[str]] = {}
    ours = _defined_here()
    for file, tree in _trees():
        libraries = frozenset(_PLAIN | set(dir(builtins))).union(
            *(_names_of(module) for module in (*_ALWAYS, *_libraries(tree)))
        )
        for name in _Followed(HOLDERS.get(file, ())).run(tree):
            found.setdefault(name, set()).add(file)
        for node in ast.walk(tree) if file.split("/")[0] in CLOSE and file != APART else ():
            if isinstance(node, ast.Attribute) and node.attr not in ours and node.attr not in libraries:
                found.setdefault(node.attr, set()).add(file)
    return found


def _libraries(tree: ast.Module) -> Iterator[str]:
    """Modules of others that a file imports, or imports something from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_of_others(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and _is_of_others(node.module):
            yield node.module
            values = (getattr(importlib.import_module(node.module), alias.name, None) for alias in node.names)
            yield from (value.__name__ for value in values if isinstance(value, types.ModuleType))


def _is_of_others(module: str) -> bool:
    return module.split(".")[0] not in ("vllm", "vllm_entropix", "__future__")


def _defined_here() -> set[str]:
    """Functions, classes, fields and attributes that any file of this package defines."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_name(node.value, "self"):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)  # of modules, and fields of classes
    return names


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


class _Followed(ast.NodeVisitor):
    """Attributes of a file's holders, and of what is assigned from them within a function."""

    def __init__(self, holders: tuple[str, ...]) -> None:
        self._holders = frozenset(holders) - {"self"}
        self._known: set[str] = set(self._holders)
        self._self_is_theirs = "self" in holders
        self._own: set[str] | None = None  # what the class around defines, if it is mixed into one of vLLM's
        self._found: set[str] = set()

    def run(self, tree: ast.Module) -> set[str]:
        self.visit(tree)
        return self._found

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self._own
        self._own = None
        if node.name.endswith("Mixin"):
            self._own = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
            for child in ast.walk(node):
                if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and _is_name(child.value, "self"):
                    self._own.add(child.attr)
            self._own |= {child.target.id for child in node.body if isinstance(child, ast.AnnAssign)}  # type: ignore[union-attr]
        self.generic_visit(node)
        self._own = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = set(self._known)
        if self._self_is_theirs and self._own is None and node.args.args and node.args.args[0].annotation is not None:
            self._known.add("self")  # a function that stands in for a method of vLLM's
        self.generic_visit(node)
        self._known = before

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self._assign(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._assign(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        for generator in node.generators:
            self.visit(generator)
        self.visit(node.elt)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._assign(one, other)
        elif isinstance(target, ast.Name) and self._theirs(value):
            self._known.add(target.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        plain = _OF_DICTIONARIES if self._held(node.value) else _PLAIN
        inherited = self._own is not None and _is_name(node.value, "self") and node.attr not in self._own
        if inherited or (self._theirs(node.value) and node.attr not in plain):
            self._found.add(node.attr)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if _is_name(node.func, "getattr") and self._theirs(node.args[0]) and isinstance(node.args[1], ast.Constant):
            self._found.add(str(node.args[1].value))

    def _held(self, node: ast.expr) -> bool:
        """Is it a holder itself, and not what has been got of one?"""
        return (isinstance(node, ast.Name) and node.id in self._holders) or (
            isinstance(node, ast.Attribute) and _is_name(node.value, "self") and node.attr in self._holders
        )

    def _theirs(self, node: ast.expr) -> bool:
        match node:
            case ast.Name(id=name):
                return name in self._known
            case ast.Attribute(value=ast.Name(id="self"), attr=attr) if attr in self._holders:
                return True
            case ast.Attribute(value=value, attr=attr):
                return self._theirs(value) and (self._held(value) or attr not in _PLAIN)
            case ast.Subscript(value=value) | ast.Starred(value=value):
                return self._theirs(value)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, *_]):
                return self._theirs(value)
            case ast.Call(func=function):
                return self._theirs(function)
            case ast.BoolOp(values=values):
                return any(self._theirs(value) for value in values)
        return False
