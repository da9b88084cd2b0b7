"""The best of n draws, folded into one distribution (SEMANTICS 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_entropix.distribution.filters import Candidates, total


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    """``base ** exponent`` for exponents 0 to 127, by squaring: `pow` rounds by an element's index in the tensor."""
    result = torch.ones_like(base)
    for bit in range(7):
        result = torch.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


def best_of_n(kept: Candidates, probabilities: Tensor, samples: Tensor) -> Tensor:
    """Distribution of the best of ``samples [rows]`` independent draws, by raw log-probability (SEMANTICS 3).

    With F the filtered probability up to a token in descending order of raw log-probability,
    ``P(token j) = (1 - F_<j)^n - (1 - F_<=j)^n``. Equally probable tokens count as one, of which the first drawn is kept:
    their joint probability is shared in proportion.

    Args:
        kept: descending logits (temperature doesn't change the order).
        probabilities: ``[rows, candidates]``, zeros for those that were filtered out.
        samples: int64 ``[rows]``; 1 leaves the row as it is.
    """
    width = probabilities.shape[-1]
    index = torch.arange(width, device=probabilities.device)
    starts_group = torch.ones_like(probabilities, dtype=torch.bool)
    starts_group[:, 1:] = kept.logits[:, 1:] != kept.logits[:, :-1]
    start = torch.where(starts_group, index, 0).cummax(dim=-1).values
    # The next group's start, seen from the right; `width` after the last group.
    next_start = torch.full_like(start, width)
    next_start[:, :-1] = torch.where(starts_group, index, width)[:, 1:].flip(-1).cummin(dim=-1).values.flip(-1)
    # Tails are summed from the small end: 1 - F would lose the last digits.
    tail = torch.zeros(probabilities.shape[0], width + 1, dtype=probabilities.dtype, device=probabilities.device)
    tail[:, :-1] = probabilities.flip(-1).cumsum(dim=-1).flip(-1)
    tail.clamp_(max=1.0)
    tail_from, tail_after = tail.gather(-1, start), tail.gather(-1, next_start)
    exponent = samples.unsqueeze(-1)
    group = _power(tail_from, exponent) - _power(tail_after, exponent)
    share = torch.where(probabilities > 0, probabilities / (tail_from - tail_after), 0.0)
    folded = group * share
    folded = folded / total(folded)
    return torch.where(samples.unsqueeze(-1) > 1, folded, probabilities)
