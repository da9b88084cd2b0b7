"""What a sampler decides for each row: the numbers that shape its distribution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parameters:
    """Sampling parameters of each row, ``[rows]`` each.

    Attributes:
        temperature: 0 means argmax.
        top_p: kept probability mass.
        top_k: int64, number of candidates.
        min_p: smallest probability relative to the largest.
        samples: int64, draws of which the most probable is kept; 1 is a plain draw.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    samples: Tensor

    def as_argmax(self, rows: Tensor) -> Parameters:
        """The same with argmax in the rows where the bool mask ``rows`` is set."""
        return Parameters(
            temperature=self.temperature.masked_fill(rows, 0.0),
            top_p=self.top_p.masked_fill(rows, 1.0),
            top_k=self.top_k.masked_fill(rows, 1),
            min_p=self.min_p.masked_fill(rows, 0.0),
            samples=self.samples.masked_fill(rows, 1),
        )
