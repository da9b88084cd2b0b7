"""Forced clarification tokens: when HELV asks, which token is forced at a row, and what is remembered.

The state of a sequence is kept **by position**. The decision for the token after position p is recorded under p, together
with everything it was based on, and the decision at p + 1 starts from the record of p. So a discarded row, a rejected draft, a
preemption or a reordered batch can't corrupt it: what is decided again is written again. A forced token counts as placed when
it is seen as the token fed at the next position, and not before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_entropix.samplers.entropix.settings import EntropixConfig

# Columns of a record.
_POSITION, _PENDING, _FORCED, _COUNT, _LAST, _SEEN = range(6)
_FIELDS = 6
_NEVER = -(2**30)

# So far below the others a token is excluded, as by -inf: the engine forces a token of its own (the end of thinking) by giving
# it a logit of 1e9, and no model or bias comes near.
_EXCLUDED = -1e8


@dataclass(frozen=True)
class ForcedRows:
    """What is forced at each row.

    Attributes:
        token_ids: int64 ``[rows]``, the token forced next, -1 for none.
    """

    token_ids: Tensor

    @property
    def mask(self) -> Tensor:
        """bool ``[rows]``: is a token forced here?"""
        return self.token_ids >= 0


class Clarification:
    """Forces the clarification's tokens, one per step, and remembers what was placed.

    Args:
        token_ids: the clarification, 1 to 64 ids.
        config: rule, cooldown and maximum.
        slots: sequences to keep state for; slot 0 is scratch and belongs to none.
        draft_tokens: drafts that may be verified in one step (0 without speculative decoding).
        device: where the state lives.
    """

    def __init__(
        self,
        token_ids: tuple[int, ...],
        config: EntropixConfig,
        slots: int,
        draft_tokens: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.length = len(token_ids)
        self.token_ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        self.rule = config.clarification_rule
        self.cooldown = config.clarification.cooldown
        self.max_per_request = config.clarification.max_per_request
        # Far enough back for a step whose tokens are thrown away while the next is already under way.
        self.ring = 2 * (draft_tokens + 2)
        self.records = self._empty(slots, device)

    def _empty(self, slots: int, device: torch.device | str) -> Tensor:
        records = torch.zeros(slots, self.ring, _FIELDS, dtype=torch.int32, device=device)
        records[..., _POSITION] = _NEVER
        return records

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` sequences in all; what is remembered stays."""
        more = self._empty(slots - self.records.shape[0], self.records.device)
        self.records = torch.cat((self.records, more))

    def forget(self, slot: int) -> None:
        """Begin anew in a slot: no insertion yet."""
        self.records[slot, :, _POSITION] = _NEVER

    def force(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        fed: Tensor,
        generated: Tensor,
        asks: Tensor,
        may: Tensor,
        valid: Tensor,
        log_normaliser: Tensor,
    ) -> ForcedRows:
        """Decide what is forced at each row, and record it. At most one row per sequence.

        Args:
            logits: ``[rows, vocab]``, masked: a token of -inf is excluded by a grammar or a ban, and waits; so does any token
                while the engine forces another by a logit beyond all measure.
            slots: int64 ``[rows]``, the row's sequence.
            positions: int64 ``[rows]``, position of the token that was fed at the row.
            fed: int64 ``[rows]``, that token.
            generated: bool ``[rows]``, was it generated (or does it belong to the prompt)?
            asks: bool ``[rows]``, the row's regime is HELV.
            may: bool ``[rows]``, the request allows forced tokens.
            valid: bool ``[rows]``, the row's token will be used; others leave no trace.
            log_normaliser: ``[rows]``, ln Σ exp(logits).
        """
        before = self.records[slots, (positions - 1) % self.ring].to(torch.int64)
        known = before[:, _POSITION] == positions - 1
        pending = torch.where(known, before[:, _PENDING], -1)
        count = torch.where(known, before[:, _COUNT], 0)
        last = torch.where(known, before[:, _LAST], _NEVER)
        seen = known & (before[:, _SEEN] > 0)

        expected = self.token_ids[pending.clamp_min(0)]
        placed = known & (before[:, _FORCED] > 0) & (fed == expected)
        count = count + (placed & (pending == 0))
        last = torch.where(placed, positions, last)
        pending = torch.where(placed, pending + 1, pending)
        pending = torch.where(pending >= self.length, -1, pending)
        is_last = generated & (fed == self.token_ids[-1])
        seen = seen | is_last

        if self.rule == "cooldown":
            eligible = (positions - last >= self.cooldown) & (count < self.max_per_request)
        else:
            eligible = ~(is_last if self.rule == "last-token" else seen)
        pending = torch.where(asks & may & eligible & (pending < 0), 0, pending)

        token_ids = self.token_ids[pending.clamp_min(0)]
        allowed = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - log_normaliser > _EXCLUDED
        forced = may & (pending >= 0) & allowed
        record = torch.stack((positions, pending, forced, count, last, seen), dim=-1).to(torch.int32)
        self.records[torch.where(valid, slots, 0), positions % self.ring] = record
        return ForcedRows(torch.where(forced, token_ids, -1))
