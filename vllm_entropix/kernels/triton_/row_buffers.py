"""What the kernels for rows of logits keep between them, allocated once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_entropix.kernels.triton_ import candidates, logits_metrics, wide_filters


@dataclass(frozen=True)
class RowBuffers:
    """As much as steps need.

    Attributes:
        rows: of a step at most.
        vocabulary: of its logits.
        metrics: see ``logits_metrics.buffers``.
        candidates: see ``candidates.buffers``.
        wide: see ``wide_filters.buffers``.
    """

    rows: int
    vocabulary: int
    metrics: tuple[Tensor, Tensor]
    candidates: tuple[Tensor, Tensor, Tensor, Tensor]
    wide: wide_filters.Buffers

    @classmethod
    def for_steps(cls, rows: int, vocabulary: int, device: torch.device | str) -> RowBuffers:
        """For steps of at most so many rows."""
        shape = (rows, vocabulary, device)
        return cls(rows, vocabulary, logits_metrics.buffers(*shape), candidates.buffers(*shape), wide_filters.buffers(*shape))

    def fit(self, logits: Tensor) -> bool:
        """Have these ``logits [rows, vocab]`` room?"""
        return len(logits) <= self.rows and logits.shape[-1] == self.vocabulary
