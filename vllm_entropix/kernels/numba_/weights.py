"""Weights exp(l - highest) of logits, and their sum: of a whole row, or of those at its front."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.elementary import exponential, largest

# Logits that are weighed together, so that their weights stay in the first-level cache.
BLOCK = 2048
# Logits of which some may be left.
_PART = 256


@compiled()
def weigh(line: Any, highest: Any, weights: Any) -> None:
    """Fill ``weights`` with exp(l - highest) of these logits, float32 ``[n]``."""
    for i in range(line.shape[0]):
        weights[i] = exponential(line[i] - highest)


@compiled()
def weigh_within(line: Any, highest: Any, least: Any, most: Any, weights: Any) -> None:
    """The same of logits from ``least`` to ``most``; others weigh nothing."""
    for i in range(line.shape[0]):
        weight = exponential(line[i] - highest)
        weights[i] = weight if (line[i] >= least) & (line[i] <= most) else np.float32(0.0)


# The order of the sum is LLVM's, so that it may add several side by side.
@compiled(fastmath={"reassoc", "nsz"})
def total_of(weights: Any) -> float:
    """Sum of float32 ``[n]``, in float64."""
    total = 0.0
    for i in range(weights.shape[0]):
        total += np.float64(weights[i])
    return total


@compiled(fastmath={"reassoc", "nsz"})
def squares_of(weights: Any) -> float:
    """Sum of the squares of float32 ``[n]``, in float64."""
    total = 0.0
    for i in range(weights.shape[0]):
        total += np.float64(weights[i]) * np.float64(weights[i])
    return total


@compiled(fastmath={"reassoc", "nsz"})
def product_of(weights: Any, line: Any, highest: Any) -> float:
    """Sum of the weights times l - highest, each float32, in float64."""
    total = 0.0
    for i in range(weights.shape[0]):
        total += np.float64(weights[i] * (line[i] - highest))
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


@compiled()
def total_and_squares(line: Any, count: int, highest: Any) -> Any:
    """Sum of the weights of the first ``count`` logits, and of their squares."""
    weights = np.empty(BLOCK, dtype=np.float32)
    total, squares = 0.0, 0.0
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        weigh(line[start : start + length], highest, weights[:length])
        total += total_of(weights[:length])
        squares += squares_of(weights[:length])
    return total, squares


@compiled()
def total_and_entropy(line: Any, count: int, highest: Any) -> Any:
    """Sum of the weights of the first ``count`` logits, and their entropy in nats."""
    weights = np.empty(BLOCK, dtype=np.float32)
    total, product = 0.0, 0.0
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        part = line[start : start + length]
        weigh(part, highest, weights[:length])
        total += total_of(weights[:length])
        product += product_of(weights[:length], part, highest)
    return total, float(np.log(total) - product / total)


@compiled()
def total_weight_within(line: Any, count: int, highest: Any, least: Any, most: Any) -> float:
    """The same of those with logits from ``least`` to ``most``; none of these is above ``highest``."""
    weights = np.empty(_PART, dtype=np.float32)
    total = 0.0
    for start in range(0, count, _PART):
        length = min(_PART, count - start)
        part = line[start : start + length]
        # Of most parts nothing may be left.
        if largest(part) >= least:
            weigh_within(part, highest, least, most, weights[:length])
            total += total_of(weights[:length])
    return total
