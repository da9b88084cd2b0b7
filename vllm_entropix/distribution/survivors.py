"""What chained samplers share: rows of logits in which those that a stage dropped are -inf.

Everything is taken over the survivors of a row: probabilities, entropies, ranks. Equal logits rank by ascending token id.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_entropix.distribution.statistics import row_sums

# Sums and ratios that reach a border but for rounding have reached it: this many units in the last place.
_ULPS = 16


def slack(values: Tensor) -> float:
    """Relative error that rounding may have made of sums and ratios of this type."""
    return _ULPS * torch.finfo(values.dtype).eps


def softmax(logits: Tensor) -> Tensor:
    """Probabilities of the survivors, ``[rows, vocab]``; 0 elsewhere."""
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    return weights / row_sums(weights).unsqueeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy over the survivors in nats, ``[rows, 1]``."""
    return row_sums(torch.special.entr(softmax(logits))).unsqueeze(-1)


def count(logits: Tensor) -> Tensor:
    """Number of survivors, ``[rows, 1]``."""
    return (logits > -torch.inf).sum(dim=-1, keepdim=True)


def most_probable(logits: Tensor) -> Tensor:
    """Bool ``[rows, vocab]``: the most probable survivor of each row, of equals the one with the lowest id."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.argmax(dim=-1, keepdim=True), True)


def keep(logits: Tensor, kept: Tensor) -> Tensor:
    """Logits with those of the bool mask ``kept`` and the most probable one; the rest is dropped."""
    return logits.where(kept | most_probable(logits), -torch.inf)


def at_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Logits divided by ``temperature [rows, 1]``; where it is 0 or less, the most probable candidate alone."""
    scaled = logits / temperature.where(temperature > 0, 1.0)
    # A tiny temperature overflows all but the differences, which are what counts.
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.where(temperature > 0, 1.0)
    scaled = scaled.where(scaled.amax(dim=-1, keepdim=True).isfinite(), shifted)
    return scaled.where((temperature > 0) | most_probable(logits), -torch.inf)


def without_softmax(logits: Tensor) -> Tensor:
    """Rows without a softmax get their whole probability on one token, as ``distribution.filters`` says; others stay.

    It is the token that vLLM's greedy draw takes: the first NaN, else the first +inf, else the first token.
    """
    token = logits.argmax(dim=-1, keepdim=True)
    broken = ~logits.gather(-1, token).isfinite()
    alone = torch.full_like(logits, -torch.inf).scatter_(-1, token, 0.0)
    return alone.where(broken, logits)


class Ranked(NamedTuple):
    """Candidates in an order of their own."""

    order: Tensor  # int64 [rows, vocab], token ids
    probabilities: Tensor  # [rows, vocab], 0 for what was dropped

    @classmethod
    def by_probability(cls, logits: Tensor) -> Ranked:
        """The most probable first."""
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        return cls(order, softmax(logits).gather(-1, order))

    def before(self) -> Tensor:
        """Probability of all that rank before a candidate, ``[rows, vocab]``."""
        return torch.nn.functional.pad(self.probabilities.cumsum(dim=-1)[:, :-1], (1, 0))

    def by_token(self, ranked: Tensor) -> Tensor:
        """Values in this order, put into the order of token ids."""
        return torch.empty_like(ranked).scatter_(-1, self.order, ranked)
