"""What a record tells of the token that was drawn, which isn't known when the record is made.

vLLM draws after the distribution has been written over the logits that the token's probability stands in. So the logits of rows
that are told of are kept until the draw: a copy of these rows and of no others. It is the one way that is right to the last bit
for every sampler: what was written can't be turned back (a best of n, a mixture), and what vLLM itself draws it divides by the
temperature first. The copy lies in memory that attention was measured with, as far as there is room, since nothing else needs
that before the next forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_entropix.distribution.plan import Drawn


def room(rows: int, vocabulary: int, device: torch.device | str, lent: Sequence[Tensor] = ()) -> Tensor:
    """As much memory as the kept logits of ``rows`` rows take beside what is ``lent``."""
    beside = max(0, rows - sum(one.numel() // vocabulary for one in lent))
    return torch.empty(beside, vocabulary, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Undrawn:
    """Rows whose token hasn't been drawn.

    Attributes:
        logits: ``[some, vocab]`` each, of all rows one after the other, masked and penalised, as they were before the sampler
            wrote.
        log_normaliser: ``[kept]``, ln Σ exp(logits).
        index: int64 ``[kept]``, which rows they are; None: they are all.
    """

    logits: tuple[Tensor, ...]
    log_normaliser: Tensor
    index: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, log_normaliser: Tensor, index: Tensor | None, lent: Sequence[Tensor]) -> Undrawn:
        """Keep rows of ``logits [rows, vocab]``.

        Args:
            logits: before the sampler writes.
            log_normaliser: ``[rows]``.
            index: int64 ``[kept]``, which rows; None: all.
            lent: float32, one dimension each, where rows go first.
        """
        rows, vocabulary = len(logits) if index is None else len(index), logits.shape[-1]
        kept, first = [], 0
        for memory in lent if logits.dtype == torch.float32 else ():
            many = min(rows - first, memory.numel() // vocabulary)
            if many:
                into = memory[: many * vocabulary].view(many, vocabulary)
                if index is None:
                    into.copy_(logits[first : first + many])
                else:
                    torch.index_select(logits, 0, index[first : first + many], out=into)
                kept.append(into)
                first += many
        if first < rows:
            kept.append(logits[first:].clone() if index is None else logits[index[first:]])
        return cls(tuple(kept), log_normaliser if index is None else log_normaliser[index], index)

    def __call__(self, token_ids: Tensor) -> Drawn:
        """The log-probability of each row's token, int64 ``[rows]``; of one that wasn't kept NaN."""
        drawn = (token_ids if self.index is None else token_ids[self.index]).unsqueeze(-1)
        of_parts = torch.split(drawn, [len(part) for part in self.logits])
        found = [part.gather(-1, tokens) for part, tokens in zip(self.logits, of_parts, strict=True)]
        logprobs = (torch.cat(found) if len(found) > 1 else found[0]).squeeze(-1) - self.log_normaliser
        if self.index is None:
            return Drawn(fields={"logprob": logprobs})
        nothing = torch.full(token_ids.shape, torch.nan, dtype=logprobs.dtype, device=logprobs.device)
        return Drawn(fields={"logprob": nothing.index_copy(0, self.index, logprobs)})
