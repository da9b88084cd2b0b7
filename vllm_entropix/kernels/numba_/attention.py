"""Queries and the CPU backend's paged keys → attention statistics of each row: ``attention.statistics.measure_layer``.

Keys are read once, where they lie, by all query heads that share them. A row's weights are kept until its heads' mean is known.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_ import AMX_BFLOAT16
from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.dot_products import TILE, add_products
from vllm_entropix.kernels.numba_.elementary import exponential, largest

# Numbers that are added in float32 before their sum goes into a float64.
_STRETCH = 512
_LN2 = float(np.log(2.0))

# What is kept of each head of a row, float64 ``[4, heads]``: entropy in bits, sum of absolute scores, what weights are to be
# multiplied with, and the weight of a slot that only counts.
_ENTROPY, _ABSOLUTE, _FACTOR, _EMPTY_WEIGHT = range(4)


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _weigh(scores: Any, maximum: Any) -> Any:
    """Turn scores into ``exp(score - maximum)``; the sums of these, of these times ``score - maximum``, and of ``|score|``."""
    total = np.float32(0.0)
    product = np.float32(0.0)
    absolute = np.float32(0.0)
    for i in range(scores.shape[0]):
        shifted = scores[i] - maximum
        weight = exponential(shifted)
        total += weight
        product += weight * shifted
        absolute += abs(scores[i])
        scores[i] = weight
    return total, product, absolute


@compiled()
def _measure_head(scores: Any, empty: int, kept: Any, head: int) -> None:
    """Turn a head's scores into weights, up to a factor, and write what is kept of it."""
    maximum = largest(scores)
    if empty > 0:
        maximum = max(maximum, np.float32(0.0))
    empty_weight = np.exp(-np.float64(maximum)) if empty > 0 else 0.0
    total = empty * empty_weight
    product = -total * maximum
    absolute = 0.0
    for start in range(0, scores.shape[0], _STRETCH):
        sums = _weigh(scores[start : start + _STRETCH], maximum)
        total += sums[0]
        product += sums[1]
        absolute += sums[2]
    kept[_ENTROPY, head] = (np.log(total) - product / total) / _LN2
    kept[_ABSOLUTE, head] = absolute
    kept[_FACTOR, head] = 1.0 / total
    kept[_EMPTY_WEIGHT, head] = empty_weight / total


@compiled()
def _measure_heads(
    queries: Any,
    scale: float,
    cache: Any,
    paired: bool,
    block_size: int,
    blocks: Any,
    begin: int,
    length: int,
    empty: int,
    weights: Any,
    kept: Any,
    kv_head: int,
) -> None:
    """Weights, up to a factor, and what is kept of the heads of one row that read key head ``kv_head``.

    Args:
        queries: float32 ``[heads, head_dim]``.
        scale: factor on the products.
        cache: ``[blocks, kv_heads, elements]``.
        paired: do keys lie in pairs?
        block_size: positions per block.
        blocks: the row's block numbers.
        begin: first position attended to.
        length: one more than the last.
        empty: slots with score 0 that only count.
        weights: float32 ``[heads, positions]``, written from ``begin % TILE`` on.
        kept: written.
        kv_head: whose keys.
    """
    heads, head_dim = queries.shape
    group = heads // cache.shape[1]
    head = kv_head * group
    scaled = (queries[head : head + group] * np.float32(scale)).ravel()
    capacity = weights.shape[1]
    scores = weights.ravel()[head * capacity : (head + group) * capacity]
    scores[:] = 0.0
    start = begin // TILE * TILE
    stop = (length + block_size - 1) // block_size
    for block in range(begin // block_size, stop):
        here = block * block_size
        low, high = max(start, here), min(length, here + block_size)
        add_products(
            scores,
            low - start,
            capacity,
            scaled,
            head_dim,
            group,
            cache[blocks[block], kv_head],
            cache[blocks[min(block + 1, stop - 1)], kv_head],
            paired,
            block_size,
            (low - here) // TILE,
            (high - here + TILE - 1) // TILE,
        )
    for one in range(head, head + group):
        _measure_head(weights[one, begin - start : length - start], empty, kept, one)


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _add_scaled(means: Any, weights: Any, factor: Any) -> None:
    for i in range(means.shape[0]):
        means[i] += weights[i] * factor


@compiled(fastmath={"contract", "reassoc", "nsz"})
def _deviation(means: Any, weights: Any, factor: Any) -> Any:
    deviation = np.float32(0.0)
    for i in range(means.shape[0]):
        deviation += abs(weights[i] * factor - means[i])
    return deviation


@compiled()
def _deviations(weights: Any, begin: int, count: int, kept: Any) -> float:
    """Absolute deviations of all heads' weights ``[heads, positions]`` from their mean, summed over ``count`` positions."""
    heads = weights.shape[0]
    means = np.empty(_STRETCH, dtype=np.float32)
    total = 0.0
    for start in range(0, count, _STRETCH):
        low, high = begin + start, begin + min(start + _STRETCH, count)
        mean = means[: high - low]
        mean[:] = 0.0
        for head in range(heads):
            _add_scaled(mean, weights[head, low:high], np.float32(kept[_FACTOR, head] / heads))
        for head in range(heads):
            total += _deviation(mean, weights[head, low:high], np.float32(kept[_FACTOR, head]))
    return total


@compiled()
def _combine(kept: Any, deviation: float, count: int, empty: int, variance_rule: int, results: Any, row: int) -> None:
    """Write a row's statistics from what was kept of its heads; of ``count`` positions, and ``empty`` slots more."""
    heads = kept.shape[1]
    if empty > 0:
        deviation += empty * np.abs(kept[_EMPTY_WEIGHT] - kept[_EMPTY_WEIGHT].mean()).sum()
    mean_entropy = kept[_ENTROPY].mean()
    variance = 0.0
    if variance_rule < 2:
        for head in range(heads):
            variance += (kept[_ENTROPY, head] - mean_entropy) ** 2
        variance /= heads - variance_rule
    counted = np.float64(count + empty) * heads
    results[0, row] = mean_entropy
    results[1, row] = variance
    results[2, row] = deviation / counted
    results[3, row] = kept[_ABSOLUTE].sum() / counted


@compiled()
def _measure_rows(
    queries: Any,
    cache: Any,
    paired: bool,
    block_size: int,
    block_table: Any,
    lengths: Any,
    window: int,
    scale: float,
    padded: int,
    variance_rule: int,
    results: Any,
    first_row: int,
    last_row: int,
) -> None:
    heads, kv_heads = queries.shape[1], cache.shape[1]
    attended = 0
    for row in range(first_row, last_row):
        attended = max(attended, lengths[row])
    if window > 0:
        attended = min(attended, window)
    # Tiles at either end may be attended to in part.
    space = np.empty(heads * (attended + 2 * TILE), dtype=np.float32)
    kept = np.empty((4, heads), dtype=np.float64)
    for row in range(first_row, last_row):
        length = lengths[row]
        begin = max(0, length - window) if window > 0 else 0
        count = length - begin
        empty = max(0, padded - count)
        positions = (length + TILE - 1) // TILE * TILE - begin // TILE * TILE
        weights = space[: heads * positions].reshape((heads, positions))
        for kv_head in range(kv_heads):
            _measure_heads(
                queries[row], scale, cache, paired, block_size, block_table[row], begin, length, empty, weights, kept, kv_head
            )
        deviation = _deviations(weights, begin % TILE, count, kept)
        _combine(kept, deviation, count, empty, variance_rule, results, row)


def measure_rows(
    queries: np.ndarray,
    cache: np.ndarray,
    layout: int,
    block_size: int,
    block_table: np.ndarray,
    lengths: np.ndarray,
    window: int,
    scale: float,
    padded: int,
    variance_rule: int,
    results: np.ndarray,
    first_row: int,
    last_row: int,
) -> None:
    """Write the statistics of rows ``first_row`` to ``last_row - 1``.

    Args:
        queries: float32 ``[rows, heads, head_dim]``.
        cache: ``[blocks, kv_heads, elements]``: float32, or bfloat16 as uint16; a block's keys stand first.
        layout: how keys lie in it, see the package.
        block_size: positions per block, a multiple of 16.
        block_table: integer ``[rows, blocks]``.
        lengths: int64 ``[rows]``, positions up to and including the row's own.
        window: positions attended to at most; 0 for all.
        scale: factor on the products.
        padded: slots that count at least, with score 0 (D2); 0 for none.
        variance_rule: 0 over heads, 1 with Bessel's correction, 2 zero.
        results: float32 ``[4, rows]``: entropy, varentropy over heads, agreement, interaction.
        first_row: where to begin.
        last_row: where to end.
    """
    paired = layout == AMX_BFLOAT16
    cache = cache.view(np.uint32) if paired else cache
    _measure_rows(
        queries, cache, paired, block_size, block_table, lengths, window, scale, padded, variance_rule, results,
        first_row, last_row,
    )  # fmt: skip
