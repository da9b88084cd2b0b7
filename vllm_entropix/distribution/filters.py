"""From logits and parameters to the kept candidates and their probabilities (SEMANTICS 3 and 4).

Only the ``top_k`` largest logits can be kept, so nothing here looks at the whole vocabulary twice: the candidates are taken
out once, and temperature, min_p, top_k, top_p and best-of-n work on them.

A row whose largest logit isn't finite has no softmax: NaN or +inf is in it (NaN counts as larger than all else), or nothing but
-inf, where every token is masked. Its metrics are NaN, its regime is ADAPTIVE with the base parameters and a plain draw,
nothing is forced in it, and its whole probability goes to the token that vLLM's greedy draw takes: the first NaN, else the
first +inf, else the first token. So a token of -inf is drawn where no other is left, and nowhere else. (vLLM's own random draws
don't agree on such rows: by softmax they give token 0, masked or not; the CPU's fused one passes over NaN.) The kernels in
``vllm_entropix.kernels`` do the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vllm_entropix.distribution.plan import Parameters
from vllm_entropix.distribution.statistics import row_sums

if TYPE_CHECKING:
    from vllm_entropix.settings.rules import Fidelity


class Candidates(NamedTuple):
    """The largest logits of each row, descending, equal ones by ascending token id: the order in which they are kept."""

    token_ids: Tensor  # int64 [rows, candidates]
    logits: Tensor  # [rows, candidates]


class Distribution(NamedTuple):
    """The distribution of a token's draw."""

    token_ids: Tensor  # int64 [rows, kept], descending probability, 0 where the probability is 0
    probabilities: Tensor  # [rows, kept], descending, zero-padded


def candidates(logits: Tensor, count: int) -> Candidates:
    """The ``count`` largest of ``logits [rows, vocab]`` (fewer if the vocabulary is smaller).

    Of equal logits at the border the lowest token ids are taken, so exactly ``count`` are, as vLLM's GPU sampler does. NaN is
    the largest of all, as for ``sort`` and ``argmax``.
    """
    count = max(1, min(count, logits.shape[-1]))
    if logits.device.type != "cpu":
        # A stable sort keeps equal logits in the order of their ids, and needs no look at the values from the host.
        # A GPU sorts by bits, in whose order a NaN with a sign is the smallest: each becomes one without.
        keys = logits.where(~logits.isnan(), torch.nan)
        ids = keys.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()
        return Candidates(ids, logits.gather(-1, ids))
    values, ids = logits.topk(min(count + 1, logits.shape[-1]), dim=-1)
    if values.shape[-1] > count:
        tied = _equal(values[:, count], values[:, count - 1])
        values, ids = values[:, :count], ids[:, :count]
        for row in tied.nonzero().flatten().tolist():
            _take_lowest_ids(logits[row], values[row], ids[row])
    # topk leaves equal logits in any order.
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return Candidates(ids.gather(-1, by_value), values)


def _take_lowest_ids(logits: Tensor, values: Tensor, ids: Tensor) -> None:
    """Replace, in one row, the ids of the smallest value by the lowest ids that share it."""
    at_border = _equal(values, values[-1])
    ids[at_border] = _equal(logits, values[-1]).nonzero().flatten()[: int(at_border.sum())]


def _equal(values: Tensor, others: Tensor) -> Tensor:
    """Elementwise equality, NaN being equal to NaN."""
    return (values == others) | (values.isnan() & others.isnan())


def filtered(
    kept: Candidates, parameters: Parameters, fidelity: Fidelity = "corrected", log_normaliser: Tensor | None = None
) -> Tensor:
    """Probabilities of the candidates after temperature, min_p, top_k and top_p, ``[rows, candidates]``.

    corrected: temperature, min_p relative to the largest probability, top_k, top_p over the renormalised top_k, renormalise.
    original: min_p has no effect (D4), top_k isn't renormalised, and top_p goes through the list ascending, so that it drops
    the most likely tokens or nothing (D5); this needs the log-normaliser of the whole row at the row's temperature.

    Args:
        kept: at least ``top_k`` candidates per row.
        parameters: of each row; temperature 0 is taken as 1 (argmax is ``top_k`` 1).
        fidelity: whose order of filters.
        log_normaliser: ``[rows]``, ln Σ exp(logits / temperature); needed with ``fidelity="original"`` only.
    """
    temperature = torch.where(parameters.temperature > 0, parameters.temperature, 1.0).unsqueeze(-1)
    top_p = parameters.top_p.unsqueeze(-1)
    within_top_k = torch.arange(kept.logits.shape[-1], device=kept.logits.device) < parameters.top_k.unsqueeze(-1)
    first = torch.zeros_like(within_top_k)
    first[:, 0] = True
    if fidelity == "original":
        assert log_normaliser is not None
        weights = torch.where(within_top_k, (kept.logits / temperature - log_normaliser.unsqueeze(-1)).exp(), 0.0)
        ascending = weights.flip(-1).cumsum(dim=-1).flip(-1) - weights
        weights = torch.where(ascending <= top_p, weights, 0.0)
        # A row with NaN or +inf, or nothing but -inf, keeps its first candidate, as below.
        weights = torch.where(log_normaliser.isfinite().unsqueeze(-1), weights, first.to(weights.dtype))
        return weights / total(weights)
    # The first candidate always stays, also where the row has nothing but -inf or NaN in it.
    relative = torch.where(first, 1.0, ((kept.logits - kept.logits[:, :1]) / temperature).exp())
    within = within_top_k & (relative >= parameters.min_p.unsqueeze(-1)) | first
    weights = torch.where(within, relative, 0.0)
    weights = weights / total(weights)
    before = weights.cumsum(dim=-1) - weights
    # At top_p 1 rounding of the running sum must not drop the tail.
    weights = torch.where((before < top_p) | (top_p >= 1) | first, weights, 0.0)
    return weights / total(weights)


def total(values: Tensor) -> Tensor:
    """Sums over the last dimension, kept, in an order that zeros at the end don't change (as `sum` would)."""
    return values.cumsum(dim=-1)[:, -1:]


def log_normaliser_at(logits: Tensor, temperature: Tensor) -> Tensor:
    """ln Σ exp(logits / temperature) of each row, ``[rows]``."""
    scaled = logits / torch.where(temperature > 0, temperature, 1.0).unsqueeze(-1)
    maximum = scaled.amax(dim=-1, keepdim=True)
    return row_sums((scaled - maximum).exp()).log() + maximum.squeeze(-1)


def compact(kept: Candidates, probabilities: Tensor) -> Distribution:
    """Kept candidates moved to the front of each row, cut to the longest row (looks at the values from the host)."""
    width = max(1, int((probabilities > 0).sum(dim=-1).max()))
    _, order = (probabilities > 0).to(torch.int8).sort(dim=-1, descending=True, stable=True)
    order = order[:, :width]
    probabilities = probabilities.gather(-1, order)
    ids = torch.where(probabilities > 0, kept.token_ids.gather(-1, order), 0)
    return Distribution(ids, probabilities)
