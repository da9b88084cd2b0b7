"""The tensor-parallel ranks that share a layer's heads, as kernels and statistics know them: an exchange of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RankGroup:
    """Ranks that heads are split over, each with as many as the others.

    Attributes:
        size: number of ranks.
        rank: this one's place among them.
        all_gather: this rank's numbers ``[n]`` → all ranks' ``[size, n]``, in their order. All have to call it.
        complete: the same in place: ``[size, n]``, contiguous, of which this rank has filled its own row.
    """

    size: int
    rank: int
    all_gather: Callable[[Tensor], Tensor]
    complete: Callable[[Tensor], None]
