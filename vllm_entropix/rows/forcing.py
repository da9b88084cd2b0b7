"""Forced clarification tokens: when HELV asks, which token is forced at a row, and what is remembered.

What is remembered is kept by position (``state``): a forced token counts as placed when it is seen as the token fed at the
next position, and not before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.rows.state import NEVER, PositionRing
from vllm_entropix.settings.rules import ClarificationRule
from vllm_entropix.settings.server import Clarification as ClarificationSettings

# What a record holds where none is known: which token of the clarification is next (-1: none), whether it was forced, how often
# the clarification was placed, where it last ended, and whether its last token was ever seen.
INITIAL = (-1, 0, 0, NEVER, 0)

# So far below the others a token is excluded, as by -inf: the engine forces a token of its own (the end of thinking) by giving
# it a logit of 1e9, and no model or bias comes near.
EXCLUDED = -1e8


class ForcingRules(Protocol):
    """What a configuration says of forced tokens."""

    @property
    def clarification(self) -> ClarificationSettings:
        """Cooldown and maximum."""

    @property
    def clarification_rule(self) -> ClarificationRule:
        """The rule against repeated clarifications."""


@dataclass(frozen=True)
class Places:
    """Where a clarification may begin, and what ends a text.

    Attributes:
        after: bool ``[vocab]``, tokens after which it may; None: after any.
        ends: ids of the tokens that end a text.
    """

    after: np.ndarray | None = None
    ends: tuple[int, ...] = ()


ANYWHERE = Places()


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
        places: where it may begin.
    """

    def __init__(
        self,
        token_ids: tuple[int, ...],
        config: ForcingRules,
        slots: int,
        draft_tokens: int = 0,
        device: torch.device | str = "cpu",
        places: Places = ANYWHERE,
    ) -> None:
        self.length = len(token_ids)
        self.token_ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        self.rule = config.clarification_rule
        self.cooldown = config.clarification.cooldown
        self.max_per_request = config.clarification.max_per_request
        self.after = None if places.after is None else torch.from_numpy(places.after).to(device)
        # A bound of 1 is none, though rounding may make a probability 1.
        bound = config.clarification.end_below
        self.end_below = math.log(bound) if bound < 1 and places.ends else math.inf
        self.ends = torch.tensor(places.ends, dtype=torch.int64, device=device)
        self.state = PositionRing(INITIAL, torch.int32, slots, draft_tokens, device)

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
        before = self.state.read(slots, positions - 1)
        pending, was_forced, count, last, was_seen = before.to(torch.int64).unbind(-1)
        seen = was_seen > 0

        expected = self.token_ids[pending.clamp_min(0)]
        placed = (was_forced > 0) & (fed == expected)
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
        eligible = eligible & self._may_begin(logits, fed, log_normaliser)
        pending = torch.where(asks & may & eligible & (pending < 0), 0, pending)

        token_ids = self.token_ids[pending.clamp_min(0)]
        allowed = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - log_normaliser > EXCLUDED
        forced = may & (pending >= 0) & allowed
        record = torch.stack((pending, forced, count, last, seen), dim=-1)
        self.state.write(slots, positions, record, valid)
        return ForcedRows(torch.where(forced, token_ids, -1))

    def _may_begin(self, logits: Tensor, fed: Tensor, log_normaliser: Tensor) -> Tensor:
        """bool ``[rows]``: is this a place where a clarification may begin?"""
        begins = torch.ones_like(fed, dtype=torch.bool)
        if self.after is not None:
            begins = self.after[fed.clamp(0, len(self.after) - 1)]
        if self.end_below < math.inf:
            begins = begins & (logits[:, self.ends].amax(dim=-1) - log_normaliser < self.end_below)
        return begins
