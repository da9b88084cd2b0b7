"""Fused versions of functions that exist in plain PyTorch too, one small file each, chosen by device.

Those beside this file are Triton's and run on a GPU; those in ``cpu`` are numba's.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch

from vllm_entropix.kernels import cpu

# How kernels are told of ``EntropixConfig.attention_varentropy``.
VARIANCE_RULES = {"heads": 0, "heads-unbiased": 1, "zero": 2}


@cache
def _triton_available() -> bool:
    return os.environ.get(cpu.SWITCH, "1") != "0" and importlib.util.find_spec("triton") is not None


def kernels_for(device: torch.device) -> Literal["numba", "triton"] | None:
    """The kernels for tensors on ``device``; None if there are none, or ``VLLM_ENTROPIX_KERNELS=0`` switches them off."""
    if device.type == "cpu":
        return "numba" if cpu.available() else None
    return "triton" if device.type == "cuda" and _triton_available() else None
