"""The switch in the environment that turns the plugin off entirely."""

from __future__ import annotations

import os

DISABLE = "VLLM_ENTROPIX_DISABLE"


def disabled() -> bool:
    """Is the plugin switched off entirely by the environment?"""
    return os.environ.get(DISABLE, "").strip().lower() not in ("", "0", "false", "no", "off")
