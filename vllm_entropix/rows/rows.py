"""The rows of one step's logits, as the engine lays them out, and what is decided of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.distribution.plan import Drawn, Parameters
from vllm_entropix.rows.text import RowText
from vllm_entropix.settings.rules import Fidelity


@dataclass(frozen=True)
class Rows:
    """The rows of one step's logits.

    Attributes:
        slots: int64 ``[rows]`` on the device: each row's slot in the sequence table.
        host_slots: int64, the slots of the step's sequences, each at least once; equal to ``slots`` if no sequence has
            more than one row.
        positions: int64 ``[rows]``: position of the row's input token; the drawn token goes to the next.
        input_ids: int64 ``[rows]``: input token of the row.
        valid: bool ``[rows]``: False for rows whose token is thrown away (an unfinished prefill).
        batch: int64 ``[rows]``: the row's sequence's index in the batch that the model ran.
        draft_index: ``[rows]``, a row's index among its sequence's rows; None if every sequence has one row.
        draft_rows: the most rows that a sequence can have.
        text: the tokens before each row; None: the engine keeps none.
    """

    slots: Tensor
    host_slots: np.ndarray
    positions: Tensor
    input_ids: Tensor
    valid: Tensor
    batch: Tensor
    draft_index: Tensor | None = None
    draft_rows: int = 1
    text: RowText | None = None

    def drawn(self, token_ids: Tensor) -> Tensor:
        """Each row's token among those of each request of the batch, ``[requests, tokens]``."""
        return token_ids[:, 0][self.batch] if self.draft_index is None else token_ids[self.batch, self.draft_index.long()]

    def select(self, index: Tensor) -> Rows:
        """Some of the rows."""
        return replace(
            self,
            slots=self.slots[index],
            positions=self.positions[index],
            input_ids=self.input_ids[index],
            valid=self.valid[index],
            batch=self.batch[index],
            draft_index=None if self.draft_index is None else self.draft_index[index],
            text=None if self.text is None else self.text.select(index),
        )


@dataclass(frozen=True)
class Decisions:
    """What is done with each row of a step.

    Attributes:
        parameters: of each row.
        forced: int64 ``[rows]``, token forced here, or -1.
        written: bool ``[rows]``, the rows that a sampler of ours draws, by the order of their filters.
        records: float32 ``[rows, columns]``, slot and record; None if nothing is to be told.
        whole: (bool ``[rows]``, what overwrites these of the logits) of rows whose sampler makes the distribution itself.
        after_draw: the drawn tokens → what they decide, of each sampler that asks.
    """

    parameters: Parameters
    forced: Tensor
    written: Mapping[Fidelity, Tensor]
    records: Tensor | None
    whole: Sequence[tuple[Tensor, Callable[[Tensor, Tensor], None]]] = ()
    after_draw: Sequence[tuple[Tensor, Callable[[Tensor], Drawn]]] = ()


# Rows and a bool mask [rows] of those whose attention is wanted → their statistics, or None if there are none to be had.
Measure = Callable[[Rows, Tensor], AttentionStatistics | None]
