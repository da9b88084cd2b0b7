"""Which kernels there are for a device."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch

from vllm_entropix.kernels import numba_


@cache
def _triton_available() -> bool:
    return os.environ.get(numba_.SWITCH, "1") != "0" and importlib.util.find_spec("triton") is not None


def kernels_for(device: torch.device) -> Literal["numba", "triton"] | None:
    """The kernels for tensors on ``device``; None if there are none, or ``VLLM_ENTROPIX_KERNELS=0`` switches them off."""
    if device.type == "cpu":
        return "numba" if numba_.available() else None
    return "triton" if device.type == "cuda" and _triton_available() else None
