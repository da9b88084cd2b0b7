"""A step's rows and the text before each: tokens that the engine keeps by position, and the drafts that the step verifies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_entropix.distribution.history import parts


@dataclass(frozen=True)
class RowText:
    """Where the tokens of each row's prompt and answer stand.

    Attributes:
        kept: ``[sequences, positions]``: tokens by position, those before a sequence's first row of the step.
        owners: int64 ``[rows]``, a row's sequence in ``kept``.
        positions: int64 ``[rows]``, of the row's input token.
        drafts: int64 ``[rows]``, a row's index among its sequence's rows, which follow one another.
        input_ids: int64, the input token of each row of the step, whichever rows these are.
        index: int64 ``[rows]``, the rows among those of the step.
        longest: no text is longer, as far as the host knows.
    """

    kept: Tensor
    owners: Tensor
    positions: Tensor
    drafts: Tensor
    input_ids: Tensor
    index: Tensor
    longest: int

    def select(self, index: Tensor) -> RowText:
        """Those of some rows."""
        return replace(
            self,
            owners=self.owners[index],
            positions=self.positions[index],
            drafts=self.drafts[index],
            index=self.index[index],
        )

    def last(self, count: int | None = None) -> Tensor:
        """The last ``count`` tokens at most, or all: int64 ``[rows, length]``, aligned to the right, -1 before the first."""
        length = min(self.longest, self.kept.shape[1])
        length = length if count is None else min(length, max(count, 0))
        found = torch.empty(len(self.positions), length, dtype=torch.int64, device=self.positions.device)
        for part in parts(found):
            found[part] = self._of(part, length)
        return found

    def _of(self, part: slice, length: int) -> Tensor:
        """The last ``length`` tokens of some rows."""
        age = torch.arange(length - 1, -1, -1, device=self.positions.device)
        positions = self.positions[part].unsqueeze(-1) - age
        old = self.kept[self.owners[part].unsqueeze(-1), positions.clamp(0, self.kept.shape[1] - 1)]
        # The row at this position, if it is one of the step's.
        new = self.input_ids[(self.index[part].unsqueeze(-1) - age).clamp_min(0)]
        of_step = age <= self.drafts[part].unsqueeze(-1)
        # What an engine keeps has half their width.
        return new.to(torch.int64).where(of_step, old).masked_fill_(positions < 0, -1)
