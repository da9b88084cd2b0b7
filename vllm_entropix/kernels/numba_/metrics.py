"""Entropy and varentropy of rows of logits: ``LogitsMetrics.from_logits``."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled

# Logits are taken this many at a time, so that the exponentials of a block stay in the first-level cache.
_BLOCK = 2048
_LN2 = float(np.log(2.0))
_LOG2E = np.float32(1.4426950408889634)
# exp() of less is 0 for our purposes: 1e-38 of the largest weight.
_FLOOR = np.float32(-87.0)
# 2**f on [-1/2, 1/2], relative error below 3e-7: coefficients of the Taylor series in ln 2, the last two adjusted.
_C = [
    np.float32(c)
    for c in (1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477, 0.0013398877)
]
_C0, _C1, _C2, _C3, _C4, _C5 = _C


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _exponentials(logits: Any, maximum: Any, shifted: Any, weights: Any, bits: Any) -> Any:
    """Fill a block's ``logits - maximum`` and its exponentials; their sum, and that of both multiplied."""
    length = logits.shape[0]
    for i in range(length):
        shifted[i] = max(logits[i] - maximum, _FLOOR)
    for i in range(length):
        scaled = shifted[i] * _LOG2E
        whole = np.floor(scaled + np.float32(0.5))
        f = scaled - whole
        weights[i] = _C0 + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * _C5))))
        bits[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    powers = bits.view(np.float32)
    total = np.float32(0.0)
    product = np.float32(0.0)
    for i in range(length):
        weights[i] *= powers[i]
        total += weights[i]
        product += weights[i] * shifted[i]
    return total, product


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _spread(shifted: Any, weights: Any, mean: Any, length: int) -> Any:
    spread = np.float32(0.0)
    for i in range(length):
        deviation = shifted[i] - mean
        spread += weights[i] * deviation * deviation
    return spread


@compiled(fastmath={"nsz"})
def _maximum(logits: Any) -> Any:
    """The largest logit; NaN if there is one."""
    largest = logits[0]
    bad = False
    for i in range(logits.shape[0]):
        largest = max(largest, logits[i])
        bad |= logits[i] != logits[i]
    return np.float32(np.nan) if bad else largest


@compiled()
def metrics_of_rows(logits: Any, entropy: Any, varentropy: Any, log_normaliser: Any, first_row: int, last_row: int) -> None:
    """Write the metrics of rows ``first_row`` to ``last_row - 1`` of ``logits [rows, vocab]``; the results are ``[rows]``.

    Blocks are merged by their means and squared deviations, so nothing cancels, and a row is read once after its maximum.
    """
    vocabulary = logits.shape[1]
    shifted = np.empty(_BLOCK, dtype=np.float32)
    weights = np.empty(_BLOCK, dtype=np.float32)
    bits = np.empty(_BLOCK, dtype=np.int32)
    for row in range(first_row, last_row):
        line = logits[row]
        maximum = _maximum(line)
        if not np.isfinite(maximum):
            entropy[row] = varentropy[row] = log_normaliser[row] = np.nan
            continue
        total = mean = spread = 0.0
        for start in range(0, vocabulary, _BLOCK):
            length = min(_BLOCK, vocabulary - start)
            block_total, block_product = _exponentials(
                line[start : start + length], maximum, shifted[:length], weights[:length], bits[:length]
            )
            block_mean = block_product / block_total
            block_spread = _spread(shifted, weights, np.float32(block_mean), length)
            merged = total + block_total
            gap = block_mean - mean
            spread += block_spread + gap * gap * total * block_total / merged
            mean += gap * block_total / merged
            total = merged
        log_normaliser[row] = maximum + np.log(total)
        entropy[row] = (np.log(total) - mean) / _LN2
        varentropy[row] = spread / total / (_LN2 * _LN2)
