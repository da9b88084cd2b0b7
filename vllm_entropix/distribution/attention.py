"""The six metrics (SEMANTICS 1): entropy and varentropy of the logits, and four statistics of attention scores.

Entropies are in bits, varentropies in bits². Reductions over the vocabulary have a fixed shape, so that a row's metrics are
bitwise the same whatever rows stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_entropix.distribution.statistics import LN2, LogitsMetrics

if TYPE_CHECKING:
    from vllm_entropix.settings.rules import AttentionVarentropy
    from vllm_entropix.settings.server import AttentionRules


@dataclass(frozen=True)
class HeadStatistics:
    """What one layer's scores say per head; heads may be a tensor-parallel rank's share.

    Attributes:
        entropy: ``[rows, heads]``, bits.
        score_sum: ``[rows, heads]``, sum of absolute scores over the real positions.
        weights: ``[rows, heads, positions]``, attention weights, 0 beyond a row's length.
        empty_weight: ``[rows, heads]``, weight of each padded slot, 0 without padding.
        counted: ``[rows]``, number of slots that means are taken over.
        empty: ``[rows]``, how many of them are padding.
    """

    entropy: Tensor
    score_sum: Tensor
    weights: Tensor
    empty_weight: Tensor
    counted: Tensor
    empty: Tensor

    @classmethod
    def from_scores(
        cls,
        scores: Tensor,
        lengths: Tensor,
        padded_positions: int | None = None,
        sinks: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> HeadStatistics:
        """Statistics of ``scores [rows, heads, positions]`` (before the softmax) with ``lengths [rows]`` real positions.

        Args:
            scores: anything may stand outside a row's real positions.
            lengths: number of positions the row's query attends to; 0 gives NaN.
            padded_positions: count this many slots, the empty ones with score 0 (D2).
            sinks: ``[heads]``, logits that take weight without being a position (attention sinks).
            starts: ``[rows]``, index of the first real position in ``scores`` (sliding windows); 0 if not given.
        """
        positions = torch.arange(scores.shape[-1], device=scores.device)
        if starts is not None:
            positions = positions - starts.unsqueeze(-1)
        real = ((positions >= 0) & (positions < lengths.unsqueeze(-1))).unsqueeze(1)
        # Masked by value and not by multiplication: a stale cache block may hold NaN.
        scores = torch.where(real, scores, 0.0)
        empty = torch.zeros_like(lengths) if padded_positions is None else (padded_positions - lengths).clamp_min(0)
        maximum = torch.where(real, scores, -math.inf).amax(dim=-1)
        maximum = torch.where(empty.unsqueeze(-1) > 0, maximum.clamp_min(0.0), maximum)
        if sinks is not None:
            maximum = torch.maximum(maximum, sinks.to(maximum.dtype))
        weights = torch.where(real, (scores - maximum.unsqueeze(-1)).exp(), 0.0)
        empty_weight = torch.where(empty.unsqueeze(-1) > 0, (-maximum).exp(), 0.0)
        normaliser = weights.sum(dim=-1) + empty.unsqueeze(-1) * empty_weight
        if sinks is not None:
            normaliser = normaliser + (sinks.to(maximum.dtype) - maximum).exp()
        weights = weights / normaliser.unsqueeze(-1)
        empty_weight = empty_weight / normaliser
        # -Σ a·ln a = Σ a·(ln Z - s): one pass over the scores. The padded slots' score is 0.
        log_normaliser = normaliser.log() + maximum
        mass = weights.sum(dim=-1) + empty.unsqueeze(-1) * empty_weight
        entropy = (log_normaliser * mass - (weights * scores).sum(dim=-1)) / LN2
        return cls(
            entropy=entropy,
            score_sum=scores.abs().sum(dim=-1),
            weights=weights,
            empty_weight=empty_weight,
            counted=lengths + empty,
            empty=empty,
        )

    def deviation_from(self, mean_weights: Tensor, mean_empty_weight: Tensor) -> Tensor:
        """Summed absolute deviation of each head's weights from the mean over all heads, ``[rows, heads]``.

        Args:
            mean_weights: ``[rows, positions]``.
            mean_empty_weight: ``[rows]``.
        """
        real = (self.weights - mean_weights.unsqueeze(1)).abs().sum(dim=-1)
        return real + self.empty.unsqueeze(-1) * (self.empty_weight - mean_empty_weight.unsqueeze(-1)).abs()


@dataclass(frozen=True)
class AttentionStatistics:
    """Attention metrics of each row, ``[rows]`` each (with a layer dimension in front before the reduction over layers).

    Attributes:
        attention_entropy: mean over heads of each head's entropy, bits.
        attention_varentropy: variance over heads of those entropies, bits².
        agreement: mean over heads and positions of the deviation from the heads' mean weight.
        interaction_strength: mean over heads and positions of the absolute score.
        measured: which rows were measured at all; None if all were. The others are sampled on logits alone.
    """

    attention_entropy: Tensor
    attention_varentropy: Tensor
    agreement: Tensor
    interaction_strength: Tensor
    measured: Tensor | None = None

    @classmethod
    def from_scores(cls, scores: Tensor, lengths: Tensor, config: AttentionRules) -> AttentionStatistics:
        """Statistics of one layer's ``scores [rows, heads, positions]`` before the softmax, ``lengths [rows]`` of them real."""
        heads = HeadStatistics.from_scores(scores, lengths, config.padded_positions)
        deviation = heads.deviation_from(heads.weights.mean(dim=1), heads.empty_weight.mean(dim=1))
        return cls.from_heads(heads.entropy, heads.score_sum, deviation, heads.counted, config.attention_varentropy)

    @classmethod
    def from_heads(
        cls, entropy: Tensor, score_sum: Tensor, deviation: Tensor, counted: Tensor, varentropy: AttentionVarentropy
    ) -> AttentionStatistics:
        """Statistics from per-head sums over **all** heads, ``[..., rows, heads]``; ``counted [..., rows]`` slots."""
        return cls(
            attention_entropy=entropy.mean(dim=-1),
            attention_varentropy=_variance_over_heads(entropy, varentropy),
            agreement=deviation.mean(dim=-1) / counted,
            interaction_strength=score_sum.mean(dim=-1) / counted,
        )

    @classmethod
    def stacked(cls, layers: Sequence[AttentionStatistics]) -> AttentionStatistics:
        """Those of several layers, with a layer dimension in front."""
        return cls(
            torch.stack([layer.attention_entropy for layer in layers]),
            torch.stack([layer.attention_varentropy for layer in layers]),
            torch.stack([layer.agreement for layer in layers]),
            torch.stack([layer.interaction_strength for layer in layers]),
        )

    def scattered(self, wanted: Tensor, rows: Tensor) -> AttentionStatistics:
        """Statistics ``[layers, len(rows)]`` of the rows that are ``wanted [all rows]``, among all, NaN for the others."""

        def spread(values: Tensor) -> Tensor:
            return values.new_full((len(values), len(wanted)), torch.nan).index_copy_(1, rows, values)

        return AttentionStatistics(
            spread(self.attention_entropy),
            spread(self.attention_varentropy),
            spread(self.agreement),
            spread(self.interaction_strength),
        )

    def select(self, index: Tensor) -> AttentionStatistics:
        """Those of some rows."""
        return AttentionStatistics(
            self.attention_entropy[index],
            self.attention_varentropy[index],
            self.agreement[index],
            self.interaction_strength[index],
            None if self.measured is None else self.measured[index],
        )

    def overlaid(self, mask: Tensor, others: AttentionStatistics) -> AttentionStatistics:
        """``others`` in the rows of the bool ``mask``, and these in the rest."""
        everywhere = torch.ones_like(mask)
        mine, theirs = (everywhere if of.measured is None else of.measured for of in (self, others))
        return AttentionStatistics(
            others.attention_entropy.where(mask, self.attention_entropy),
            others.attention_varentropy.where(mask, self.attention_varentropy),
            others.agreement.where(mask, self.agreement),
            others.interaction_strength.where(mask, self.interaction_strength),
            theirs.where(mask, mine),
        )

    def mean_over_layers(self) -> AttentionStatistics:
        """The mean over the leading (layer) dimension."""
        if len(self.attention_entropy) == 1:  # a mean for each would launch a kernel for each
            return AttentionStatistics(
                self.attention_entropy[0],
                self.attention_varentropy[0],
                self.agreement[0],
                self.interaction_strength[0],
                self.measured,
            )
        return AttentionStatistics(
            self.attention_entropy.mean(dim=0),
            self.attention_varentropy.mean(dim=0),
            self.agreement.mean(dim=0),
            self.interaction_strength.mean(dim=0),
            self.measured,
        )


def _variance_over_heads(entropy: Tensor, rule: AttentionVarentropy) -> Tensor:
    if rule == "zero":
        return torch.zeros_like(entropy[..., 0])
    return entropy.var(dim=-1, correction=1 if rule == "heads-unbiased" else 0)


@dataclass(frozen=True)
class Metrics:
    """The six metrics of each row, ``[rows]`` each. Attention metrics that weren't measured are NaN."""

    entropy: Tensor
    varentropy: Tensor
    attention_entropy: Tensor
    attention_varentropy: Tensor
    agreement: Tensor
    interaction_strength: Tensor


def joined(logits: LogitsMetrics, attention: AttentionStatistics | None) -> Metrics:
    """Both as six metrics; NaN where attention wasn't measured."""
    if attention is None:
        unmeasured = torch.full_like(logits.entropy, torch.nan)
        return Metrics(logits.entropy, logits.varentropy, unmeasured, unmeasured, unmeasured, unmeasured)
    attended = (
        metric.to(logits.entropy.dtype)
        if attention.measured is None
        else torch.where(attention.measured, metric.to(logits.entropy.dtype), torch.nan)
        for metric in (
            attention.attention_entropy,
            attention.attention_varentropy,
            attention.agreement,
            attention.interaction_strength,
        )
    )
    return Metrics(logits.entropy, logits.varentropy, *attended)
