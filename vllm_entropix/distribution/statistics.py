"""What the logits alone say of each row: entropy, varentropy and log-normaliser, in one pass (SEMANTICS 1).

Entropies are in bits, varentropies in bits². Reductions over the vocabulary have a fixed shape, so that a row's metrics are
bitwise the same whatever rows stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
        maxima: ``[rows, groups]``, largest logits of groups of tokens, where a kernel leaves them for the one that writes.
    """

    entropy: Tensor
    varentropy: Tensor
    log_normaliser: Tensor
    maxima: Tensor | None = None

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


def spread(logits: Tensor) -> Tensor:
    """Population standard deviation of the finite ``logits [rows, vocab]``, ``[rows]``; 0 where there are none.

    In float64 if they are float64, otherwise in float32.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    finite = logits.isfinite()
    count = row_sums(finite.to(dtype)).clamp_min(1.0)
    values = torch.where(finite, logits.to(dtype), 0.0)
    mean = row_sums(values) / count
    deviations = torch.where(finite, values - mean.unsqueeze(-1), 0.0)
    return (row_sums(deviations.square()) / count).sqrt()
