"""CPU kernels, compiled by numba (which vLLM requires) when an engine starts and cached on disk.

A decision is some hundred operations on a handful of numbers per row. In PyTorch each costs a dispatch, and the larger ones a
wake-up of sleeping threads, which together take longer than the model's own step at small sizes.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

SWITCH = "VLLM_ENTROPIX_KERNELS"

# How a block's keys lie in the CPU backend's cache.
VECTOR_FLOAT32, VECTOR_BFLOAT16, AMX_BFLOAT16 = range(3)


@cache
def available() -> bool:
    """Can CPU kernels be used? ``VLLM_ENTROPIX_KERNELS=0`` switches all kernels off, for comparison and in case of trouble."""
    return os.environ.get(SWITCH, "1") != "0" and importlib.util.find_spec("numba") is not None
