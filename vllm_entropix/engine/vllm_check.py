"""The check that vLLM is what this package expects (see ``expected``)."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_entropix.engine.expected import ATTRIBUTES, COPY_ON_WRITE, FUNCTIONS, FUNCTIONS_OF_SERVERS, LATER, NAMES
from vllm_entropix.engine.sources import Sources
from vllm_entropix.engine.versions import MINORS


def problems() -> list[str]:
    """What is not as the adapters expect it in the installed vLLM; empty if all is well.

    Functions are looked at as they are in this process, where another plugin may have replaced them; attributes, most of which
    exist only in a running engine, in vLLM's sources.
    """
    import vllm

    found = [*_version_problems(vllm.__version__), *_installed_problems(Path(vllm.__file__).parent.parent)]
    of_servers = {module: functions for module, functions in FUNCTIONS_OF_SERVERS.items() if module in sys.modules}
    for module_name, functions in {**FUNCTIONS, **of_servers}.items():
        for qualified, parameters in functions.items():
            target: Any
            try:
                target = importlib.import_module(module_name)
                for part in qualified.split("."):
                    target = getattr(target, part)
            except (ImportError, AttributeError):
                found.append(f"{module_name}.{qualified} is missing")
                continue
            found += _without(f"{module_name}.{qualified}", "parameter", parameters, set(inspect.signature(target).parameters))
    return found


def problems_of_sources(root: Path) -> list[str]:
    """The same for a vLLM that isn't installed, by its sources alone.

    Args:
        root: the folder that ``vllm`` lies in, of an unpacked wheel for example.
    """
    sources = Sources(root)
    found = _attribute_problems(sources)
    for module, functions in {**FUNCTIONS, **FUNCTIONS_OF_SERVERS}.items():
        if module in LATER and sources.names(module) is None:
            continue
        for qualified, parameters in functions.items():
            has = sources.parameters(module, qualified)
            found += (
                [f"{module}.{qualified} is missing"]
                if has is None
                else _without(f"{module}.{qualified}", "parameter", parameters, has)
            )
    return found


def _version_problems(version: str) -> list[str]:
    parts = version.split(".")
    known = parts[0] == "0" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) in MINORS
    return [] if known else [f"its version is {version}"]


@functools.cache
def _installed_problems(root: Path) -> list[str]:
    """Once a process, however many engines it makes: reading the sources takes seconds."""
    return _attribute_problems(Sources(root))


@functools.cache
def copy_on_write_problems() -> list[str]:
    """What the installed vLLM lacks for blocks that branches share; empty if it lacks nothing."""
    import vllm

    return _without_attributes(Sources(Path(vllm.__file__).parent.parent), COPY_ON_WRITE)


def _attribute_problems(sources: Sources) -> list[str]:
    found = []
    for module, names in NAMES.items():
        has = sources.names(module)
        found += [f"{module} is missing"] if has is None else _without(module, "name", names, has)
    return found + _without_attributes(sources, ATTRIBUTES)


def _without_attributes(sources: Sources, table: Mapping[str, Mapping[str, tuple[str, ...]]]) -> list[str]:
    found = []
    for module, classes in table.items():
        for name, attributes in classes.items():
            has = sources.attributes(module, name)
            found += (
                [f"{module}.{name} is missing"] if has is None else _without(f"{module}.{name}", "attribute", attributes, has)
            )
    return found


def _without(name: str, kind: str, wanted: tuple[str, ...], has: set[str]) -> list[str]:
    missing = [one for one in wanted if one not in has]
    return [f"{name} has no {kind} {', '.join(missing)}"] if missing else []
