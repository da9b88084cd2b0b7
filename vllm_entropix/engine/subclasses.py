"""Subclasses of whatever worker and scheduler an engine uses, made on demand.

vLLM takes such classes by qualified name and resolves it in each process. Here a name tells what to subclass, so any worker or
scheduler, also another plugin's, is extended and not replaced.
"""

from __future__ import annotations

import importlib
from typing import Any

_PREFIX = f"{__name__}."
WORKER, SCHEDULER = "EntropixWorker", "EntropixScheduler"


def qualified_name(kind: str, base: str) -> str:
    """The name under which the subclass of ``base`` (a qualified name) resolves; itself if it is one already."""
    if base.startswith(f"{_PREFIX}{kind}"):
        return base
    # vLLM splits a name at its last dot.
    return f"{_PREFIX}{kind}<{base.replace('.', '/')}>"


def _mixin(kind: str) -> type:
    """What is mixed in front; imported here, because each process needs one of them."""
    if kind == WORKER:
        from vllm_entropix.engine.worker import EntropixWorkerMixin

        return EntropixWorkerMixin
    from vllm_entropix.engine.scheduler import EntropixSchedulerMixin

    return EntropixSchedulerMixin


def __getattr__(name: str) -> Any:
    kind, bracket, rest = name.partition("<")
    if kind not in (WORKER, SCHEDULER) or not bracket or not rest.endswith(">"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, base_name = rest[:-1].replace("/", ".").rpartition(".")
    base = getattr(importlib.import_module(module), base_name)
    subclass = type(name, (_mixin(kind), base), {"__module__": __name__})
    globals()[name] = subclass
    return subclass
