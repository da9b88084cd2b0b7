"""What a row's own tokens say: which of them repeat, and what went on with a repetition.

Tokens are int64 ``[rows, length]``, aligned to the right; -1 stands before a row's first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def aligned(histories: Sequence[Sequence[int] | None], device: torch.device | str = "cpu") -> Tensor:
    """Tokens of rows of different lengths; None is an empty row."""
    width = max((len(row) for row in histories if row is not None), default=0)
    tokens = torch.full((len(histories), width), -1, dtype=torch.int64, device=device)
    for index, row in enumerate(histories):
        if row is not None and len(row):
            tokens[index, width - len(row) :] = torch.as_tensor(row, dtype=torch.int64)
    return tokens


def window(tokens: Tensor, last: Tensor) -> Tensor:
    """The last ones of ``tokens``, ``last [rows, 1]`` of each row; all where it is negative."""
    age = torch.arange(tokens.shape[-1] - 1, -1, -1, device=tokens.device)
    return tokens.where((age < last) | (last < 0), -1)


def since_breaker(tokens: Tensor, breakers: Sequence[tuple[int, ...]]) -> Tensor:
    """Number of tokens after the last breaker, ``[rows, 1]``; of all tokens where there is none.

    Of breakers that begin at the same token the longest counts.
    """
    width = tokens.shape[-1]
    length = (tokens >= 0).sum(dim=-1, keepdim=True)
    # A vocabulary has thousands of tokens with a line break in them, and few breakers of several tokens.
    matched = torch.isin(tokens, breakers_alone(breakers, tokens.device)).to(tokens.dtype)
    for breaker in sorted(breakers, key=len):
        if 1 < len(breaker) <= width:
            begins = torch.zeros_like(tokens, dtype=torch.bool)
            found = tokens.unfold(-1, len(breaker), 1) == torch.tensor(breaker, device=tokens.device)
            begins[:, : width - len(breaker) + 1] = found.all(dim=-1)
            matched = matched.masked_fill(begins, len(breaker))
    positions = torch.arange(width, device=tokens.device)
    last = torch.where(matched > 0, positions, -1).amax(dim=-1, keepdim=True)
    after = width - last - matched.gather(-1, last.clamp_min(0))
    return after.where(last >= 0, length)


@lru_cache(maxsize=64)
def _alone(breakers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor([breaker[0] for breaker in breakers if len(breaker) == 1], dtype=torch.int64, device=device)


def breakers_alone(breakers: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Token ids of the breakers that are one token, int64."""
    return _alone(tuple(breakers), device)


def longest_repetitions(tokens: Tensor, enough: Tensor, vocabulary: int) -> Tensor:
    """How much of a row's end stood before each token already, the longest such: int64 ``[rows, vocabulary]``.

    -1 for a token that follows none of the row's tokens, 0 for one that never followed the last one.

    Args:
        tokens: the rows.
        enough: ``[rows, 1]``; lengths are counted up to it.
        vocabulary: number of tokens.
    """
    ends, follows = tokens[:, :-1], tokens[:, 1:]
    lengths = torch.zeros_like(ends)
    alive = ends >= 0
    length = 0
    while True:
        # Is the token `length` before each end the one that stands so far before the row's end?
        width = ends.shape[-1] - length
        alive = alive[:, -width:] if width else alive[:, :0]
        alive = alive & (ends[:, :width] == tokens[:, -1 - length : -length or None]) & (enough > length)
        if not alive.any():
            break
        length += 1
        lengths[:, -width:] += alive
    known = (ends >= 0) & (follows < vocabulary)
    found = torch.full((len(tokens), vocabulary), -1, dtype=torch.int64, device=tokens.device)
    return found.scatter_reduce_(-1, follows.where(known, 0), lengths.where(known, -1), "amax")
