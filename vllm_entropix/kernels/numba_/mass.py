"""Candidates by their mass, the nearest to some logit first, without an order of the vocabulary.

The border is found by sharing candidates among bins of their logits, and those of the border's bins among bins again, so that
only a few are ever put in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.bins import BINS, bins_of, in_bins, step_of
from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.elementary import exponential, rounded_up
from vllm_entropix.kernels.numba_.weights import BLOCK, product_of, total_of, weigh

# Candidates that are put in order at last.
_FEW = 64
# The first candidate always stays.
_LEAST_SHARE = 1e-9


@compiled()
def band_of_mass(line: Any, count: int, low: Any, high: Any, typical: bool, share: float, spare: Any) -> Any:
    """Find the candidates before which there is less than a share of the mass, one at least.

    The most probable come first; where ``typical``, those whose surprise is nearest to the entropy. Equals come by their ids.

    Args:
        line: float32, the candidates' logits at its front; those that are equal to the last that stays, but come behind it,
            become -inf.
        count: how many there are.
        low: no candidate's logit is smaller.
        high: the largest logit.
        typical: which come first.
        share: of the mass.
        spare: int32 ``[count]`` or more, room to work in.

    Returns:
        The band's least and greatest logit; its weight; and is any logit -inf now?
    """
    step = step_of(low, high)
    masses = np.zeros(BINS, dtype=np.float64)
    total, product = _share_among_bins(line, count, high, step, typical, masses)
    # How far below the largest logit those lie that are as surprising as the entropy.
    centre = product / total if typical else 0.0
    limit, before, size = max(share, _LEAST_SHARE) * total, 0.0, count
    if step > 0:
        furthest = np.float64(high) - np.float64(low)
        first, last, first_below, last_below, before = _border_bins(masses, centre, 1 / np.float64(step), furthest, limit)
        if before < 0:
            return low, high, total, False
        size = in_bins(line, count, high, step, first, last, first_below, last_below, spare)
    else:
        for i in range(count):
            spare[i] = i
    size, before = _few(line, high, centre, spare, size, before, limit, masses)
    return _last_of(line, high, centre, spare[:size], before, limit)


@compiled()
def _share_among_bins(line: Any, count: int, high: Any, step: Any, typical: bool, masses: Any) -> Any:
    """Add all candidates' weights to their bins; their sum, and where ``typical`` that of their products with l - high."""
    weights, bins = np.empty(BLOCK, dtype=np.float32), np.empty(BLOCK, dtype=np.int32)
    total, product = 0.0, 0.0
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        part = line[start : start + length]
        weigh(part, high, weights[:length])
        total += total_of(weights[:length])
        if typical:
            product += product_of(weights[:length], part, high)
        bins_of(part, high, step, bins[:length])
        for i in range(length):
            masses[np.uint32(bins[i])] += np.float64(weights[i])
    return total, product


@compiled()
def _border_bins(masses: Any, centre: float, width: float, furthest: float, limit: float) -> Any:
    """Find the bins that the border may be in, by the bins' mass from the centre on outwards.

    Returns:
        First and last of those from the largest logit to the centre, and of those below; and the mass that is surely nearer
        than all of them, negative if all of it is below the ``limit``.
    """
    middle = min(int(-centre / width), BINS - 1)
    first = last = middle
    inside, nearest = masses[middle], 0.0
    while inside < limit:
        # How far it is to the ends of what is inside; nothing is beyond the outermost bins.
        above = -first * width - centre if first > 0 else np.inf
        below = centre + (last + 1) * width if last < BINS - 1 else np.inf
        nearest = min(above, below)
        if nearest == np.inf:
            return 0, 0, 0, 0, -1.0
        if above < below:
            first -= 1
            inside += masses[first]
        else:
            last += 1
            inside += masses[last]
    outermost = max(-first * width - centre, centre + ((last + 1) * width if last < BINS - 1 else furthest))
    # Rounding may have put a candidate in the bin beside its own.
    slack = 1e-3 * width
    before = 0.0
    first, last, first_below, last_below = BINS, -1, BINS, -1
    for one in range(BINS):
        upper = -one * width - centre
        lower = upper - width if one < BINS - 1 else -furthest - centre
        near = 0.0 if lower <= 0.0 <= upper else min(abs(lower), abs(upper))
        if max(abs(lower), abs(upper)) + slack < nearest:
            before += masses[one]
        elif near - slack <= outermost:
            if one <= middle:
                first, last = min(first, one), one
            else:
                first_below, last_below = min(first_below, one), one
    return first, last, first_below, last_below, before


@compiled()
def _distance(value: Any, high: Any, centre: float) -> float:
    """How far a logit is from the centre, which candidates are ranked by."""
    return abs(np.float64(value) - np.float64(high) - centre)


@compiled()
def _few(line: Any, high: Any, centre: float, members: Any, size: int, before: float, limit: float, masses: Any) -> Any:
    """Narrow ``members`` down to few, or to equals, the border among them; how many are left, and the mass before them."""
    while size > _FEW:
        nearest, furthest = np.inf, -np.inf
        for member in members[:size]:
            distance = _distance(line[member], high, centre)
            nearest, furthest = min(nearest, distance), max(furthest, distance)
        scale = BINS / (furthest - nearest) if furthest > nearest else np.inf
        if scale == np.inf:
            break
        masses[:] = 0.0
        for member in members[:size]:
            where = min(int((_distance(line[member], high, centre) - nearest) * scale), BINS - 1)
            masses[where] += exponential(line[member] - high)
        border, begun = 0, before
        while border < BINS and before + masses[border] < limit:
            before += masses[border]
            border += 1
        if border == BINS:  # rounding: the border is the end of what is looked at
            return size, begun
        left = 0
        for member in members[:size]:
            members[left] = member
            left += min(int((_distance(line[member], high, centre) - nearest) * scale), BINS - 1) == border
        size = left
    return size, before


@compiled()
def _last_of(line: Any, high: Any, centre: float, members: Any, before: float, limit: float) -> Any:
    """Put members in order, and see through which one they stay; what :func:`band_of_mass` returns."""
    distances = np.empty(len(members), dtype=np.float64)
    for m in range(len(members)):
        distances[m] = _distance(line[members[m]], high, centre)
    order = np.argsort(distances, kind="mergesort")
    least, most, last, dropped = np.float32(np.inf), np.float32(-np.inf), 0.0, False
    for m in range(len(members)):
        value = line[members[order[m]]]
        if m == 0 or before < limit:
            before += exponential(value - high)
            least, most, last = min(least, value), max(most, value), distances[order[m]]
        else:
            line[members[order[m]]] = -np.inf
            dropped = True
    level = np.float64(high) + centre
    return min(least, rounded_up(level - last)), min(high, max(most, -rounded_up(-level - last))), before, dropped
