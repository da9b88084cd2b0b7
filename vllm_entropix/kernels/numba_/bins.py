"""A row's candidates shared among bins of their logits, the largest first, so that few of them need an order."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.candidates import STRETCH
from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.weights import BLOCK

BINS = 1024
# Logits so far below the largest weigh next to nothing, and share a bin.
_REACH = 32.0
# So little as float32 can divide by.
_NARROWEST = 1e-30


@compiled()
def step_of(low: Any, high: Any) -> Any:
    """Bins for each unit below the largest logit, float32; 0 where all logits are as good as equal."""
    reach = min(np.float64(high) - np.float64(low), _REACH)
    return np.float32(BINS / reach if reach > _NARROWEST else 0.0)


@compiled()
def bins_of(line: Any, high: Any, step: Any, bins: Any) -> None:
    """Fill ``bins`` with each candidate's: ``step`` of them for each unit below the largest logit, the last without an end."""
    last = np.float32(BINS - 1)
    for i in range(line.shape[0]):
        place = (high - line[i]) * step
        bins[i] = np.int32(place if place < last else last)


@compiled()
def _are_in(bins: Any, first: int, last: int, first_below: int, last_below: int) -> int:
    """How many of these bins are among the border's?"""
    found = 0
    for i in range(bins.shape[0]):
        found += ((bins[i] >= first) & (bins[i] <= last)) | ((bins[i] >= first_below) & (bins[i] <= last_below))
    return found


@compiled()
def in_bins(
    line: Any, count: int, high: Any, step: Any, first: Any, last: Any, first_below: Any, last_below: Any, members: Any
) -> int:
    """Fill ``members`` with the indices of the candidates in these bins; how many there are."""
    bins, size = np.empty(BLOCK, dtype=np.int32), 0
    first, last, first_below, last_below = np.int32(first), np.int32(last), np.int32(first_below), np.int32(last_below)
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        bins_of(line[start : start + length], high, step, bins[:length])
        for begin in range(0, length, STRETCH):
            end = min(begin + STRETCH, length)
            if _are_in(bins[begin:end], first, last, first_below, last_below):
                for i in range(begin, end):
                    members[size] = start + i
                    size += _are_in(bins[i : i + 1], first, last, first_below, last_below)
    return size
