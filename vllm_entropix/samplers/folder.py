"""What this folder holds: its classes of a kind."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any


def classes_of(kind: Any) -> Iterator[Any]:
    """The concrete subclasses of ``kind`` that a module or package of this folder defines, by the modules' names."""
    package = importlib.import_module(__package__ or "")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        loaded = importlib.import_module(f"{package.__name__}.{module.name}")
        for _, one in inspect.getmembers(loaded, inspect.isclass):
            if one.__module__ == loaded.__name__ and issubclass(one, kind) and not inspect.isabstract(one):
                yield one
