"""What takes one part of entropix away, so that a study can tell what this part does: for tests and studies alone.

A server whose ``experiments`` say so draws regimes by chance, lets rows read one another's attention, or asks for
clarifications by chance. What is by chance is a function of the row's metrics, whose last bits say nothing of their size. So a
token that is computed again is decided as before, whatever else is in the batch, and no seed or state is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_entropix.samplers.entropix.sampler import EntropixSampler
from vllm_entropix.samplers.entropix.settings import SHARED

if TYPE_CHECKING:
    from vllm_entropix.distribution.attention import AttentionStatistics
    from vllm_entropix.distribution.constants import Constants
    from vllm_entropix.distribution.statistics import LogitsMetrics

_WORD = 0xFFFFFFFF
# Coins for different ends, so that a regime by chance and a clarification by chance aren't one another's.
_OF_REGIMES, _OF_CLARIFICATIONS = 0x5EED, 0xC1A7


class ExperimentalSampler(EntropixSampler):
    """Entropix with what ``experiments`` change, in plain PyTorch whatever kernels there are."""

    uses_kernels = False

    def classified(self, metrics: LogitsMetrics, constants: Constants) -> Tensor:
        """The regimes, or as many of each by chance: row for row without regard to the metrics."""
        own = super().classified(metrics, constants)
        if not self.config.experiments.random_regimes:
            return own
        shares = torch.stack([constants[f"experiments.shares.{name}"].expand(len(own)) for name in SHARED], dim=-1)
        drawn = (coins(metrics, _OF_REGIMES)[:, None] >= shares.cumsum(-1)).sum(-1)
        return torch.where(_is_finite(metrics), drawn, own)

    def attention(self, measured: AttentionStatistics | None) -> AttentionStatistics | None:
        """The attention that was measured, or each row's that of the measured row before it in the batch."""
        if measured is None or not self.config.experiments.shuffled_attention:
            return measured
        rows = torch.arange(len(measured.attention_entropy), device=measured.attention_entropy.device)
        there = rows if measured.measured is None else rows[measured.measured]
        return measured.select(rows.index_copy(0, there, there.roll(1)))

    def asks(self, regime: Tensor, metrics: LogitsMetrics, constants: Constants) -> Tensor:
        """Rows that ask for a clarification: those in HELV, or as many by chance."""
        if not self.config.experiments.random_clarifications:
            return super().asks(regime, metrics, constants)
        return _is_finite(metrics) & (coins(metrics, _OF_CLARIFICATIONS) < constants["experiments.shares.helv"])


def coins(metrics: LogitsMetrics, salt: int) -> Tensor:
    """A number per row from 0 (included) to 1, float32 ``[rows]``, even and independent of how large the metrics are.

    Args:
        metrics: whose bits are mixed.
        salt: gives other numbers for the same rows.
    """
    mixed = torch.full_like(metrics.entropy, salt, dtype=torch.int64)
    for values in (metrics.entropy, metrics.varentropy, metrics.log_normaliser):
        mixed = mixed ^ (values.float().contiguous().view(torch.int32).to(torch.int64) & _WORD)
        # MurmurHash3's last steps; the products' low 32 bits are right though int64 overflows.
        mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B & _WORD
        mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 & _WORD
        mixed = mixed ^ (mixed >> 16)
    return (mixed >> 8).float() / 2**24


def _is_finite(metrics: LogitsMetrics) -> Tensor:
    return metrics.entropy.isfinite() & metrics.varentropy.isfinite()
