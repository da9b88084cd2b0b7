"""Entry points: what runs when vLLM loads its plugins, and when a user imports this package."""

from __future__ import annotations

from vllm_entropix.engine.patches import install
from vllm_entropix.engine.switch import disabled


def register() -> None:
    """Make vLLM know the entropix sampler; called by vLLM in every process, any number of times.

    Nothing changes for anybody who doesn't ask for it: the patches only look for ``entropix`` in the additional config. If it
    is switched off, the only patch left tells whoever asks nevertheless.
    """
    install(only="EngineArgs.create_engine_config" if disabled() else None)
