"""What vLLM's sources say, read without importing them: attributes of classes and parameters of functions.

Most of what the adapters use are attributes that exist only once an engine runs, in a process whose errors look like a hang.
The sources tell of them before, and of other versions of vLLM than the installed one.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """Sources of an installed or unpacked vLLM.

    Args:
        root: the folder that ``vllm`` lies in.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tree = functools.cache(self._parse)

    def _parse(self, module: str) -> ast.Module | None:
        path = self.root.joinpath(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return ast.parse(candidate.read_text(encoding="utf-8"))
        return None

    def _find(self, module: str, qualified: str) -> _Definition | None:
        scope: ast.Module | _Definition | None = self._tree(module)
        for name in qualified.split("."):
            if scope is None:
                return None
            scope = next((node for node in _definitions(scope) if node.name == name), None)
        return scope if isinstance(scope, _Definition) else None

    def attributes(self, module: str, name: str) -> set[str] | None:
        """What a class defines in its body, and what its methods assign to ``self``; None if there is no such class."""
        found = self._find(module, name)
        if not isinstance(found, ast.ClassDef):
            return None
        names = {node.name for node in _definitions(found)}
        for node in ast.walk(found):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                names.add(node.attr)
        for statement in found.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names.add(statement.target.id)
            elif isinstance(statement, ast.Assign):
                names.update(target.id for target in statement.targets if isinstance(target, ast.Name))
        return names

    def names(self, module: str) -> set[str] | None:
        """What a module defines or imports at its top, whatever the condition; None if there is no such module."""
        tree = self._tree(module)
        if tree is None:
            return None
        names: set[str] = set()
        waiting: list[ast.AST] = list(tree.body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, _Definition):
                names.add(node.name)
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            waiting += ast.iter_child_nodes(node)
        return names

    def parameters(self, module: str, qualified: str) -> set[str] | None:
        """Names of a function's parameters; None if there is no such function."""
        found = self._find(module, qualified)
        if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        arguments = found.args
        return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _definitions(scope: ast.Module | _Definition) -> Iterator[_Definition]:
    return (node for node in scope.body if isinstance(node, _Definition))


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
