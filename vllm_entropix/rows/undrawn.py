"""What a record tells of the token that was drawn, which isn't known when the record is made.

vLLM draws after the distribution has been written over the logits that the token's probability stands in. So the logits of rows
that are told of are kept until the draw: a copy of these rows and of no others. It is the cheapest way that is right for every
sampler, since what was written can't be turned back (a best of n, a mixture).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_entropix.distribution.plan import Drawn


def room(rows: int, vocabulary: int, device: torch.device | str) -> Tensor:
    """As much memory as the kept logits of ``rows`` rows take at most."""
    return torch.empty(rows, vocabulary, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Undrawn:
    """Rows whose token hasn't been drawn.

    Attributes:
        logits: ``[kept, vocab]``, masked and penalised, as they were before the sampler wrote.
        log_normaliser: ``[kept]``, ln Σ exp(logits).
        index: int64 ``[kept]``, which rows they are; None: they are all.
    """

    logits: Tensor
    log_normaliser: Tensor
    index: Tensor | None = None

    def __call__(self, token_ids: Tensor) -> Drawn:
        """The log-probability of each row's token, int64 ``[rows]``; of one that wasn't kept NaN."""
        drawn = token_ids if self.index is None else token_ids[self.index]
        logprobs = self.logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) - self.log_normaliser
        if self.index is None:
            return Drawn(fields={"logprob": logprobs})
        nothing = torch.full(token_ids.shape, torch.nan, dtype=logprobs.dtype, device=logprobs.device)
        return Drawn(fields={"logprob": nothing.index_copy(0, self.index, logprobs)})
