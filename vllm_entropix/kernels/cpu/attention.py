"""Queries and the CPU backend's paged keys → attention statistics of each row: ``attention.statistics.measure_layer``.

Keys are read once, a block at a time, into a tile that all query heads of their group share.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from vllm_entropix.kernels.cpu import AMX_BFLOAT16, VECTOR_FLOAT32


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _read_tile(cache: Any, block: int, head: int, layout: int, bits: Any, tile: Any) -> Any:
    """One block's keys of one head as float32 ``[head_dim, block_size]``."""
    head_dim, size = tile.shape
    raw = cache[block, head]
    if layout == AMX_BFLOAT16:
        place = 0
        for group in range(size // 16):
            for pair in range(head_dim // 2):
                for position in range(16):
                    bits[2 * pair, group * 16 + position] = np.uint32(raw[place]) << np.uint32(16)
                    bits[2 * pair + 1, group * 16 + position] = np.uint32(raw[place + 1]) << np.uint32(16)
                    place += 2
        return bits.view(np.float32)
    for d in range(head_dim):
        line = bits[d]
        part = raw[d * size : (d + 1) * size]
        for position in range(size):
            line[position] = np.uint32(part[position]) << np.uint32(16)
    return bits.view(np.float32)


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})  # type: ignore[untyped-decorator]
def _add_scores(scores: Any, query: Any, tile: Any, start: int, stop: int) -> None:
    for d in range(tile.shape[0]):
        q = query[d]
        line = tile[d]
        for position in range(stop - start):
            scores[start + position] += q * line[position]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def measure_rows(
    queries: Any,
    cache: Any,
    layout: int,
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
    """Write the statistics of rows ``first_row`` to ``last_row - 1``.

    Args:
        queries: float32 ``[rows, heads, head_dim]``.
        cache: ``[blocks, kv_heads, elements]``: float32, or bfloat16 as uint16; a block's keys stand first.
        layout: how keys lie in it, see the package.
        block_size: positions per block.
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
    heads, head_dim = queries.shape[1], queries.shape[2]
    kv_heads = cache.shape[1]
    groups = heads // kv_heads
    bits = np.empty((head_dim, block_size), dtype=np.uint32)
    tile = bits.view(np.float32)
    entropies = np.empty(heads, dtype=np.float64)
    for row in range(first_row, last_row):
        length = lengths[row]
        begin = max(0, length - window) if window > 0 else 0
        count = length - begin
        scores = np.zeros((heads, count), dtype=np.float32)
        scaled = queries[row] * np.float32(scale)
        for block in range(begin // block_size, (length + block_size - 1) // block_size):
            low, high = max(begin, block * block_size), min(length, (block + 1) * block_size)
            for kv_head in range(kv_heads):
                number = block_table[row, block]
                if layout == VECTOR_FLOAT32:
                    keys = cache[number, kv_head][: head_dim * block_size].reshape((head_dim, block_size)).view(np.float32)
                else:
                    keys = _read_tile(cache, number, kv_head, layout, bits, tile)
                part = keys[:, low - block * block_size : high - block * block_size]
                for group in range(groups):
                    head = kv_head * groups + group
                    _add_scores(scores[head], scaled[head], part, low - begin, high - begin)
        _statistics(scores, max(0, padded - count), entropies, variance_rule, results, row)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _statistics(scores: Any, empty: int, entropies: Any, variance_rule: int, results: Any, row: int) -> None:
    """Statistics of one row from ``scores [heads, count]``, which become the attention weights."""
    heads, count = scores.shape
    absolute = 0.0
    empty_weights = np.zeros(heads)
    for head in range(heads):
        line = scores[head]
        largest = line.max()
        if empty > 0:
            largest = max(largest, np.float32(0.0))
        total = empty * np.exp(-np.float64(largest)) if empty > 0 else 0.0
        weighted = 0.0
        for i in range(count):
            score = line[i]
            weight = np.exp(score - largest)
            absolute += abs(score)
            total += weight
            weighted += weight * score
            line[i] = weight
        entropies[head] = (np.log(total) + largest - weighted / total) / np.log(2.0)
        inverse = 1.0 / total
        for i in range(count):
            line[i] *= np.float32(inverse)
        if empty > 0:
            empty_weights[head] = np.exp(-np.float64(largest)) * inverse
    deviation = 0.0
    for i in range(count):
        mean = np.float32(0.0)
        for head in range(heads):
            mean += scores[head, i]
        mean /= np.float32(heads)
        for head in range(heads):
            deviation += abs(scores[head, i] - mean)
    if empty > 0:
        deviation += empty * np.abs(empty_weights - empty_weights.mean()).sum()
    counted = np.float64(count + empty) * heads
    mean_entropy = entropies.mean()
    variance = 0.0
    if variance_rule < 2:
        for head in range(heads):
            variance += (entropies[head] - mean_entropy) ** 2
        variance /= heads - variance_rule
    results[0, row] = mean_entropy
    results[1, row] = variance
    results[2, row] = deviation / counted
    results[3, row] = absolute / counted
