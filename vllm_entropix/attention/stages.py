"""Statistics of layers on several pipeline stages: sums that travel from stage to stage, and their mean on the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_entropix.distribution.attention import AttentionStatistics


@dataclass(frozen=True)
class StageStatistics:
    """Statistics of the layers of a pipeline stage and of all stages before it, as they travel to the next one.

    One tensor, so that a step's hidden states are followed by one message more: 20 bytes a row, however many layers there are.

    Attributes:
        values: float32 ``[5, requests, rows]``: for the last rows of each request of the batch, the last one first, the
            row's position (exact below 2²⁴) and the sums over layers of the four metrics. NaN for rows not measured.
    """

    values: Tensor

    @classmethod
    def of_rows(cls, requests: int, index: Tensor, positions: Tensor, per_layer: AttentionStatistics) -> StageStatistics:
        """Sums over this stage's layers.

        Args:
            requests: requests in the batch.
            index: int64 ``[measured]``, indices in the batch of those that were measured.
            positions: int64 ``[measured, rows]``, negative where a request has no such row.
            per_layer: each metric ``[layers, measured · rows]``.
        """
        measured, rows = positions.shape
        metrics = (
            per_layer.attention_entropy,
            per_layer.attention_varentropy,
            per_layer.agreement,
            per_layer.interaction_strength,
        )
        sums = torch.stack([positions.to(torch.float32), *(metric.sum(dim=0).view(measured, rows) for metric in metrics)])
        return cls(sums.new_full((5, requests, rows), torch.nan).index_copy_(1, index, sums))

    def add(self, earlier: StageStatistics | None) -> StageStatistics:
        """With the sums of the stages before; all stages add in the same order."""
        if earlier is None:
            return self
        return StageStatistics(torch.cat((self.values[:1], earlier.values[1:] + self.values[1:])))

    def sums(self, requests: Tensor, positions: Tensor) -> Tensor:
        """float32 ``[4, rows]`` of some rows, by their request's index in the batch and their position.

        NaN for a row that the earlier stages didn't measure: never another row's statistics.
        """
        last = self.values[0, requests, 0]
        offsets = (last - positions).nan_to_num(nan=0.0).long().clamp(0, self.values.shape[2] - 1)
        found = self.values[:, requests, offsets]
        return torch.where(found[0] == positions, found[1:], torch.nan)


def mean_over_stages(earlier: Tensor, per_layer: AttentionStatistics | None, layers: int) -> AttentionStatistics:
    """The mean over ``layers`` layers, of which some were measured on earlier stages.

    Args:
        earlier: float32 ``[4, rows]``, sums over the layers of earlier stages (``StageStatistics.sums``).
        per_layer: statistics of this stage's layers, ``[layers, rows]`` each; None if none is observed.
        layers: observed layers of all stages together.
    """
    entropy, varentropy, agreement, strength = earlier
    if per_layer is not None:
        entropy = entropy + per_layer.attention_entropy.sum(dim=0)
        varentropy = varentropy + per_layer.attention_varentropy.sum(dim=0)
        agreement = agreement + per_layer.agreement.sum(dim=0)
        strength = strength + per_layer.interaction_strength.sum(dim=0)
    return AttentionStatistics(entropy / layers, varentropy / layers, agreement / layers, strength / layers)
