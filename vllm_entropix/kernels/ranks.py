"""The tensor-parallel ranks that share a layer's heads, as kernels and statistics know them: an exchange of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Ranks that heads are split over, each with as many as the others.

    Attributes:
        number: how many.
        gather: this rank's numbers ``[n]`` → all ranks' ``[number, n]``, in their order. All have to call it.
    """

    number: int
    gather: Callable[[Tensor], Tensor]
