"""From logits and a plan's numbers to the candidates of each row and their probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_entropix.distribution import filters
from vllm_entropix.distribution.best_of_n import best_of_n
from vllm_entropix.distribution.filters import Candidates
from vllm_entropix.distribution.plan import Parameters

if TYPE_CHECKING:
    from vllm_entropix.settings.rules import Fidelity


def shape(
    logits: Tensor, parameters: Parameters, order: Fidelity, count: int, fold_draws: bool = True
) -> tuple[Candidates, Tensor]:
    """The ``count`` largest logits of each row and the probabilities they are drawn with, ``[rows, count]``.

    Args:
        logits: ``[rows, vocab]``; float64 is kept, all else becomes float32.
        parameters: of each row.
        order: of the filters.
        count: at least the largest top_k.
        fold_draws: fold the best of n draws in; False gives the filtered distribution alone.
    """
    logits = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    kept = filters.candidates(logits, count)
    log_normaliser = filters.log_normaliser_at(logits, parameters.temperature) if order == "original" else None
    probabilities = filters.filtered(kept, parameters, order, log_normaliser)
    return kept, best_of_n(kept, probabilities, parameters.samples) if fold_draws else probabilities
