"""Logits and parameters → final log-probabilities: ``filters.candidates``, ``filtered`` and ``best_of_n``, written in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.elementary import largest
from vllm_entropix.kernels.numba_.weights import total_weight

# exp() of it and of less is 0.
_LEAST = -745.14
# Logits whose largest is asked for together.
_STRETCH = 64


@compiled()
def _sink(values: Any, ids: Any, size: int, value: Any, token: int) -> None:
    """Replace the heap's first element, which is kept last: the smallest value, of equal ones that of the highest id."""
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (values[right] < values[child] or (values[right] == values[child] and ids[right] > ids[child])):
            child = right
        if not (values[child] < value or (values[child] == value and ids[child] > token)):
            break
        values[parent], ids[parent] = values[child], ids[child]
        parent = child
    values[parent], ids[parent] = value, token


@compiled()
def _rise(values: Any, ids: Any, size: int, value: Any, token: int) -> None:
    """Add to a heap of ``size`` elements, which is kept as ``_sink`` says."""
    index = size
    while index > 0:
        parent = (index - 1) // 2
        if not (values[parent] > value or (values[parent] == value and ids[parent] < token)):
            break
        values[index], ids[index] = values[parent], ids[parent]
        index = parent
    values[index], ids[index] = value, token


@compiled()
def largest_tokens(logits: Any, count: int, threshold: Any, values: Any, ids: Any) -> int:
    """The ``count`` largest logits of at least ``threshold``, descending, equal ones by ascending id; how many there are.

    Tokens are seen by ascending id, so of equal ones at the border the first seen stay. No logit is NaN.
    """
    size = 0
    for start in range(0, logits.shape[0], _STRETCH):
        stop = min(start + _STRETCH, logits.shape[0])
        # Most have nothing to offer, and their largest is found by vector instructions.
        if largest(logits[start:stop]) < threshold:
            continue
        for token in range(start, stop):
            value = logits[token]
            if not value >= threshold:
                continue
            if size < count:
                _rise(values, ids, size, value, token)
                size += 1
            elif value > values[0]:
                _sink(values, ids, size, value, token)
            else:
                continue
            if size == count:
                # From now on only what beats the smallest kept is of interest.
                threshold = max(threshold, values[0])
    for end in range(size - 1, 0, -1):
        value, token = values[end], ids[end]
        values[end], ids[end] = values[0], ids[0]
        _sink(values, ids, end, value, token)
    return size


@compiled()
def largest_beside_nan(logits: Any, count: int, values: Any, ids: Any) -> None:
    """As ``largest_tokens``, of a row that may have NaN, which counts as larger than all else; there are ``count``."""
    taken = np.zeros(logits.shape[0], dtype=np.bool_)
    for index in range(count):
        best = -1
        for token in range(logits.shape[0]):
            if taken[token]:
                continue
            if best < 0 or (logits[best] == logits[best] and not logits[token] <= logits[best]):
                best = token
        taken[best] = True
        values[index], ids[index] = logits[best], best


@compiled()
def _power(base: float, exponent: int) -> float:
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


@compiled()
def _divide(line: Any, highest: Any, t: float) -> None:
    """Replace each l by (l - highest) / t."""
    factor = 1.0 / t
    for i in range(line.shape[0]):
        line[i] = np.float32((np.float64(line[i]) - highest) * factor)


@compiled()
def _subtract(line: Any, log_total: float) -> None:
    """Replace each l by l - log_total, and what has no probability by -inf."""
    least = np.float32(_LEAST)
    for i in range(line.shape[0]):
        line[i] = np.float32(np.float64(line[i]) - log_total) if line[i] > least else np.float32(-np.inf)


@compiled()
def _scale(line: Any, t: float) -> None:
    """Overwrite a row of finite softmax with its log-probabilities at temperature ``t``."""
    _divide(line, np.float64(largest(line)), t)
    total = total_weight(line, line.shape[0], np.float32(0.0))
    _subtract(line, np.log(total))


@compiled()
def distribute_rows(
    logits: Any,
    temperature: Any,
    top_p: Any,
    top_k: Any,
    min_p: Any,
    samples: Any,
    log_normaliser: Any,
    forced: Any,
    sampled: Any,
    first_row: int,
    last_row: int,
) -> None:
    """Overwrite the sampled rows ``first_row`` to ``last_row - 1`` with the log-probabilities they are drawn from.

    Args:
        logits: float32 ``[rows, vocab]``, changed in place.
        temperature: float32 ``[rows]``; 0 is argmax.
        top_p: float32 ``[rows]``.
        top_k: int64 ``[rows]``.
        min_p: float32 ``[rows]``.
        samples: int64 ``[rows]``, draws of which the most probable is kept.
        log_normaliser: float32 ``[rows]``; not finite where the largest logit isn't, or one is NaN.
        forced: int64 ``[rows]``, token forced here, or -1.
        sampled: bool ``[rows]``; other rows are left alone.
        first_row: where to begin.
        last_row: where to end.
    """
    vocabulary = logits.shape[1]
    widest = 1
    for row in range(first_row, last_row):
        widest = max(widest, min(top_k[row], vocabulary))
    value = np.empty(widest, dtype=np.float32)
    token = np.empty(widest, dtype=np.int64)
    weights = np.empty(widest, dtype=np.float64)
    tails = np.empty(widest + 1, dtype=np.float64)
    for row in range(first_row, last_row):
        if not sampled[row]:
            continue
        line = logits[row]
        if forced[row] >= 0:
            line[:] = -np.inf
            line[forced[row]] = 0.0
            continue
        if not np.isfinite(log_normaliser[row]):
            largest_beside_nan(line, 1, value, token)
            line[:] = -np.inf
            line[token[0]] = 0.0
            continue
        t = np.float64(temperature[row]) if temperature[row] > 0 else 1.0
        if top_k[row] >= vocabulary and top_p[row] >= 1.0 and min_p[row] <= 0.0 and samples[row] <= 1:
            # Everything stays, so nothing needs to be put in order.
            _scale(line, t)
            continue
        # What min_p drops needn't be looked at. A little lower, so that rounding here decides nothing.
        threshold = np.float32(-np.inf)
        if min_p[row] > 0.0:
            highest = np.float64(largest(line))
            slack = 1e-3 * (1.0 + np.abs(highest))
            threshold = np.float32(highest + t * np.log(np.float64(min_p[row])) - slack)
        count = largest_tokens(line, min(top_k[row], vocabulary), threshold, value, token)
        total = weights[0] = 1.0
        kept = 1
        # Descending, so whatever min_p drops stands at the end.
        while kept < count:
            weight = np.exp((np.float64(value[kept]) - np.float64(value[0])) / t)
            # min_p 1 keeps what float32 can't tell from the largest.
            if not (weight > 0.0 and np.float32(weight) >= min_p[row]):
                break
            weights[kept] = weight
            total += weight
            kept += 1
        if top_p[row] < 1.0:
            before = weights[0]
            stop = 1
            while stop < kept and before / total < top_p[row]:
                before += weights[stop]
                stop += 1
            kept, total = stop, before
        n = samples[row]
        line[:] = -np.inf
        if n <= 1:
            for i in range(kept):
                line[token[i]] = np.log(weights[i] / total)
            continue
        tails[kept] = 0.0
        for i in range(kept - 1, -1, -1):
            tails[i] = tails[i + 1] + weights[i] / total
        i = 0
        while i < kept:
            # Equal logits count as one, of which the first drawn is kept: they share in proportion, which is equally.
            end = i + 1
            while end < kept and value[end] == value[i]:
                end += 1
            joint = _power(min(tails[i], 1.0), n) - _power(min(tails[end], 1.0), n)
            for j in range(i, end):
                line[token[j]] = np.log(joint / (end - i))
            i = end
