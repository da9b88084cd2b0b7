"""How a function of vLLM's is replaced by one that wraps it, once, when the module that has it is imported."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import wrapt

from vllm_entropix.engine.expected import LATER

_SENTINEL = "__vllm_entropix__"
# What the functions have that a vLLM built with patches/ lets plugins extend.
_EXTENDED = "__extended__"

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Patch:
    """One change of vLLM at run time.

    Attributes:
        module: module that is changed.
        owners: classes in it whose attribute is wrapped; none if it is a function of the module.
        attribute: the function that is wrapped.
        wrap: makes the replacement from the original, called when the module is imported.
        why: what can't be had otherwise.
        how: what the replacement does.
        upstream: issue or pull request that would make it unnecessary.
        remove_when: the condition to drop it.
        package: what the module needs to be imported, where that isn't a requirement of vLLM's.
    """

    module: str
    owners: tuple[str, ...]
    attribute: str
    wrap: Wrap
    why: str
    how: str
    upstream: str
    remove_when: str
    package: str | None = None

    @property
    def name(self) -> str:
        """The patched function, as people write it."""
        return f"{self.owners[0] if self.owners else self.module}.{self.attribute}"

    def install(self) -> None:
        """Apply now if the module is loaded, otherwise as soon as it is."""
        wrapt.register_post_import_hook(self._apply, self.module)

    def missing(self) -> str | None:
        """Why the patch isn't in place, in a few words; None if it is. Imports the module."""
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            if self.module in LATER:
                return None  # this vLLM has nothing to patch
            return f"{self.module} can't be imported: {error}"
        for name in self.owners or (None,):
            owner = module if name is None else getattr(module, name, None)
            target = getattr(owner, self.attribute, None)
            if target is None:
                return f"{self.module} has no such function"
            if not getattr(target, _SENTINEL, False):
                return "vLLM's own function is in place; another plugin may have put it back"
        return None

    def _apply(self, module: Any) -> None:
        for owner in [getattr(module, name, None) for name in self.owners] if self.owners else [module]:
            static = inspect.getattr_static(owner, self.attribute, None)
            # An unknown vLLM is left alone here; ``vllm_check`` refuses to start on it, with an explanation.
            if owner is None or static is None or getattr(getattr(owner, self.attribute), _SENTINEL, False):
                continue
            original = getattr(owner, self.attribute)
            if hasattr(original, _EXTENDED):
                # This vLLM was built with our source patches: nothing of it is replaced.
                importlib.import_module("vllm.plugins.extension_points").extend(original, self.wrap)
                setattr(original, _SENTINEL, True)
                continue
            replacement = functools.wraps(original)(self.wrap(original))
            setattr(replacement, _SENTINEL, True)
            setattr(owner, self.attribute, staticmethod(replacement) if isinstance(static, staticmethod) else replacement)
