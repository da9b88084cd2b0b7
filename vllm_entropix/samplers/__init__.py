"""Samplers: each turns a row's logits and what is known of them into a distribution.

``Chain`` and ``names`` are for notebooks: neither needs vLLM.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_entropix.samplers.chain import Chain, names

__all__ = ["Chain", "names"]


def __getattr__(name: str) -> Any:
    # Lazily: settings are read in processes that run no chain.
    if name in __all__:
        from vllm_entropix.samplers import chain

        return getattr(chain, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
