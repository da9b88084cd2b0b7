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

if TYPE_CHECKING:
    from vllm_entropix.config import AttentionVarentropy, EntropixConfig

LN2 = math.log(2.0)

# Rows are taken in chunks of about this many logits: 1 MiB of float32, which stays in a core's L2 cache over the passes below.
_CHUNK_ELEMENTS = 1 << 18
_SERIAL_ELEMENTS = (1 << 15) - 1
# Partial sums of this many terms. Below PyTorch's grain size (32768), so that a sum is never split over threads, which
# would make a single row's sum depend on whether it stands alone.
_SUM_BLOCK = 8192
# Stands for -inf after the maximum was subtracted: exp() of it is 0 in every float type, and 0 times it is 0 rather than NaN.
_FLOOR = -1e4


@dataclass(frozen=True)
class LogitsMetrics:
    """What the logits alone say of each row, ``[rows]`` each.

    Attributes:
        entropy: of the next-token distribution, bits.
        varentropy: of the next-token distribution, bits².
        log_normaliser: ln Σ exp(logits); a logit minus it is the token's log-probability.
    """

    entropy: Tensor
    varentropy: Tensor
    log_normaliser: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor) -> LogitsMetrics:
        """Metrics of ``logits [rows, vocab]``, in float64 if they are float64, otherwise in float32.

        A logit of -inf counts 0 (D15). A row with NaN, +inf or nothing but -inf gives NaN.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows, vocabulary = logits.shape
        entropy = torch.empty(rows, dtype=dtype, device=logits.device)
        varentropy, log_normaliser = torch.empty_like(entropy), torch.empty_like(entropy)
        # Chunks of small vocabularies stay below PyTorch's grain size: waking threads takes longer than the work.
        chunk_elements = _SERIAL_ELEMENTS if vocabulary < _SERIAL_ELEMENTS // 2 else _CHUNK_ELEMENTS
        step = max(1, chunk_elements // max(1, vocabulary))
        for start in range(0, rows, step):
            chunk = slice(start, start + step)
            _metrics_of_chunk(logits[chunk], dtype, entropy[chunk], varentropy[chunk], log_normaliser[chunk])
        return cls(entropy, varentropy, log_normaliser)


def _metrics_of_chunk(logits: Tensor, dtype: torch.dtype, entropy: Tensor, varentropy: Tensor, log_normaliser: Tensor) -> None:
    maximum = logits.amax(dim=-1, keepdim=True)
    shifted = logits.to(dtype, copy=True).sub_(maximum).clamp_(min=_FLOOR)
    weights = shifted.exp()
    normaliser = row_sums(weights)
    mean = row_sums(weights * shifted) / normaliser
    torch.add(normaliser.log(), maximum.squeeze(-1).to(dtype), out=log_normaliser)
    torch.sub(normaliser.log(), mean, out=entropy)
    entropy.div_(LN2)
    # Deviations from the mean before squaring: E[x²] - E[x]² would cancel for peaked distributions.
    deviations = shifted.sub_(mean.unsqueeze(-1)).square_().mul_(weights)
    torch.div(row_sums(deviations), normaliser, out=varentropy)
    varentropy.div_(LN2 * LN2)


def row_sums(values: Tensor) -> Tensor:
    """Sums over the last dimension of ``values [rows, n]``, in an order that depends on n alone."""
    rows, length = values.shape
    if length <= _SUM_BLOCK:
        return values.sum(dim=-1)
    whole = length - length % _SUM_BLOCK
    partial = values[:, :whole].view(rows, -1, _SUM_BLOCK).sum(dim=-1).sum(dim=-1)
    return partial if whole == length else partial + values[:, whole:].sum(dim=-1)


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
            starts: ``[rows]``, place of the first real position in ``scores`` (sliding windows); 0 if not given.
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
    def from_scores(cls, scores: Tensor, lengths: Tensor, config: EntropixConfig) -> AttentionStatistics:
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

    def mean_over_layers(self) -> AttentionStatistics:
        """The mean over the leading (layer) dimension."""
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
