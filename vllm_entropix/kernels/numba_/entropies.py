"""Candidates of a bounded entropy, the most probable first, without an order of the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.bins import BINS, bins_of, in_bins, step_of
from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.elementary import exponential
from vllm_entropix.kernels.numba_.weights import BLOCK, product_of, total_of, weigh


@compiled()
def band_of_entropy(line: Any, count: int, low: Any, high: Any, share: float, slack: float, spare: Any) -> Any:
    """Find the most probable candidates whose entropy, renormalised, is at most a share of that of all; one at least.

    Each further candidate raises that entropy, so the border is found by sharing candidates among bins of their logits, and
    those of the border's bin are put in order. Equals come by their ids.

    Args:
        line: float32, the candidates' logits at its front, none of them -inf; those that are equal to the last that stays,
            but come behind it, become -inf.
        count: how many there are.
        low: no candidate's logit is smaller.
        high: the largest logit.
        share: of the entropy.
        slack: what is above the border by so little isn't.
        spare: int32 ``[count]`` or more, room to work in.

    Returns:
        The least logit that stays, the weight of all that stay, and is any logit -inf now?
    """
    step = step_of(low, high)
    masses, products = np.zeros(BINS, dtype=np.float64), np.zeros(BINS, dtype=np.float64)
    total, product = _share_among_bins(line, count, high, step, masses, products)
    limit = share * _entropy(total, product) + slack
    border, weight, moment = 0, 0.0, 0.0
    while border < BINS:
        if not _entropy(weight + masses[border], moment + products[border]) <= limit:
            break
        weight, moment = weight + masses[border], moment + products[border]
        border += 1
    if border == BINS:
        return low, total, False
    members = spare[: in_bins(line, count, high, step, border, border, BINS, -1, spare)]
    values = np.empty(len(members), dtype=np.float32)
    for m in range(len(members)):
        values[m] = -line[members[m]]
    order = np.argsort(values, kind="mergesort")
    # None of them may stay: their bin then lies below all that do.
    least, within, dropped = -values[order[0]], True, False
    for place in order:
        member = members[place]
        below = line[member] - high
        one = np.float64(exponential(below))
        within = within and (weight == 0 or _entropy(weight + one, moment + one * np.float64(below)) <= limit)
        if within:
            weight, moment = weight + one, moment + one * np.float64(below)
            least = line[member]
        else:
            line[member] = -np.inf
            dropped = True
    return least, weight, dropped


@compiled()
def _entropy(weight: float, moment: float) -> float:
    """In nats, of candidates by the sum of their weights exp(l - high), and that of the weights times l - high."""
    return float(np.log(weight) - moment / weight) if weight > 0 else 0.0


@compiled()
def _share_among_bins(line: Any, count: int, high: Any, step: Any, masses: Any, products: Any) -> Any:
    """Add all candidates' weights to their bins, and the weights times l - high; the sums of both."""
    weights, bins = np.empty(BLOCK, dtype=np.float32), np.empty(BLOCK, dtype=np.int32)
    total, product = 0.0, 0.0
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        part = line[start : start + length]
        weigh(part, high, weights[:length])
        total += total_of(weights[:length])
        product += product_of(weights[:length], part, high)
        bins_of(part, high, step, bins[:length])
        for i in range(length):
            where = np.uint32(bins[i])
            masses[where] += np.float64(weights[i])
            products[where] += np.float64(weights[i] * (part[i] - high))
    return total, product
