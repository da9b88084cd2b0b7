"""Entry points: what runs when vLLM loads its plugins, and when a user imports this package."""

from __future__ import annotations

import os

DISABLE = "VLLM_ENTROPIX_DISABLE"


def disabled() -> bool:
    """Is the plugin switched off entirely by the environment?"""
    return os.environ.get(DISABLE, "").strip().lower() not in ("", "0", "false", "no", "off")


def register() -> None:
    """Make vLLM know the entropix sampler; called by vLLM in every process, any number of times.

    Nothing changes for anybody who doesn't ask for it: the patches only look for ``entropix`` in the additional config. If it
    is switched off, the only patch left tells whoever asks nevertheless.
    """
    from vllm_entropix.engine import compat

    compat.install(only="EngineArgs.create_engine_config" if disabled() else None)
