"""Weights exp(l - highest) of logits, and their sum: of a whole row, or of those at its front."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.elementary import exponential

# Logits that are weighed together, so that their weights stay in the first-level cache.
BLOCK = 2048


@compiled()
def weigh(line: Any, highest: Any, weights: Any) -> None:
    """Fill ``weights`` with exp(l - highest) of these logits, float32 ``[n]``."""
    for i in range(line.shape[0]):
        weights[i] = exponential(line[i] - highest)


# The order of the sum is LLVM's, so that it may add several side by side.
@compiled(fastmath={"reassoc", "nsz"})
def total_of(weights: Any) -> float:
    """Sum of float32 ``[n]``, in float64."""
    total = 0.0
    for i in range(weights.shape[0]):
        total += np.float64(weights[i])
    return total


@compiled()
def total_weight(line: Any, count: int, highest: Any) -> float:
    """Sum of the weights exp(l - highest) of the first ``count`` logits."""
    weights = np.empty(BLOCK, dtype=np.float32)
    total = 0.0
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        weigh(line[start : start + length], highest, weights[:length])
        total += total_of(weights[:length])
    return total
