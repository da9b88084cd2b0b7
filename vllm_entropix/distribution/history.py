"""What a row's own tokens say: which of them repeat, and what went on with a repetition.

Tokens are int64 ``[rows, length]``, aligned to the right; -1 stands before a row's first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.kernels.backend import kernels_for

# Tokens that are looked at together: what is computed of each takes some hundred bytes meanwhile, which no engine sets aside.
# PyTorch shares no fewer among a CPU's threads; of a GPU each part takes some twenty launches.
TOGETHER_ON_CPU, TOGETHER = 2**15, 2**20


def aligned(histories: Sequence[Sequence[int] | None], device: torch.device | str = "cpu") -> Tensor:
    """Tokens of rows of different lengths; None is an empty row."""
    width = max((len(row) for row in histories if row is not None), default=0)
    tokens = torch.full((len(histories), width), -1, dtype=torch.int64, device=device)
    for index, row in enumerate(histories):
        if row is not None and len(row):
            tokens[index, width - len(row) :] = torch.as_tensor(row, dtype=torch.int64)
    return tokens


def parts(tokens: Tensor) -> Iterator[slice]:
    """Rows of ``[rows, length]`` that are looked at together, so that long texts take little memory; one slice at least."""
    rows, length = tokens.shape
    together = TOGETHER_ON_CPU if tokens.device.type == "cpu" else TOGETHER
    step = max(together // max(length, 1), 1)
    return (slice(first, first + step) for first in range(0, max(rows, 1), step))


def window(tokens: Tensor, last: Tensor) -> Tensor:
    """The last ones of ``tokens``, ``last [rows, 1]`` of each row; all where it is negative."""
    age = torch.arange(tokens.shape[-1] - 1, -1, -1, device=tokens.device)
    return tokens.where((age < last) | (last < 0), -1)


@dataclass(frozen=True)
class Breakers:
    """Token ids that end a repetition.

    Attributes:
        alone: int64, those that are one token. A vocabulary has thousands of tokens with a line break in them.
        several: int64 each, those of several tokens, which are few; the shortest first.
    """

    alone: Tensor
    several: tuple[Tensor, ...]

    @classmethod
    def on(cls, breakers: Sequence[tuple[int, ...]], device: torch.device) -> Breakers:
        """Breakers on a device."""
        alone = [breaker[0] for breaker in breakers if len(breaker) == 1]
        several = sorted((breaker for breaker in breakers if len(breaker) > 1), key=len)
        return cls(
            torch.tensor(alone, dtype=torch.int64, device=device),
            tuple(torch.tensor(breaker, dtype=torch.int64, device=device) for breaker in several),
        )


def since_breaker(tokens: Tensor, breakers: Breakers) -> Tensor:
    """Number of tokens after the last breaker, ``[rows, 1]``; of all tokens where there is none.

    Of breakers that begin at the same token the longest counts.
    """
    width = tokens.shape[-1]
    length = (tokens >= 0).sum(dim=-1, keepdim=True)
    matched = torch.isin(tokens, breakers.alone).to(tokens.dtype)
    for breaker in breakers.several:
        if len(breaker) <= width:
            begins = torch.zeros_like(tokens, dtype=torch.bool)
            found = tokens.unfold(-1, len(breaker), 1) == breaker
            begins[:, : width - len(breaker) + 1] = found.all(dim=-1)
            matched = matched.masked_fill(begins, len(breaker))
    positions = torch.arange(width, device=tokens.device)
    last = torch.where(matched > 0, positions, -1).amax(dim=-1, keepdim=True)
    after = width - last - matched.gather(-1, last.clamp_min(0))
    return after.where(last >= 0, length)


def repetitions(tokens: Tensor, enough: Tensor) -> Tensor:
    """How many tokens, up to and with each but a row's last, stand at the row's end, too: int64 ``[rows, length - 1]``.

    Args:
        tokens: the rows, of two tokens or more.
        enough: ``[rows, 1]``, whole numbers; lengths are counted up to it.
    """
    kernels = kernels_for(tokens.device)
    if kernels == "numba":
        from vllm_entropix.kernels.numba_.repetitions import repetitions_of_rows
        from vllm_entropix.kernels.numba_.threads import share_rows

        found = torch.empty(len(tokens), tokens.shape[-1] - 1, dtype=torch.int64)
        arguments = (tokens.contiguous().numpy(), enough.to(torch.int64).numpy(), found.numpy())
        costs = np.full(len(tokens), 5 * tokens.shape[-1])
        share_rows(costs, lambda first, last: repetitions_of_rows(*arguments, first, last))
        return found
    if kernels == "triton":
        from vllm_entropix.kernels.triton_ import repetitions as triton

        return triton.repetitions(tokens, enough)
    return repetitions_by_torch(tokens, enough)


def repetitions_by_torch(tokens: Tensor, enough: Tensor) -> Tensor:
    """What :func:`repetitions` gives, by PyTorch, which waits for the device once per token of the longest."""
    ends = tokens[:, :-1]
    lengths = torch.zeros_like(ends)
    alive = ends >= 0
    length = 0
    while True:
        # Is the token `length` before each end the one that stands so far before the row's end?
        width = ends.shape[-1] - length
        alive = alive[:, -width:] if width else alive[:, :0]
        alive = alive & (ends[:, :width] == tokens[:, -1 - length : -length or None]) & (enough > length)
        if not alive.any():
            return lengths
        length += 1
        lengths[:, -width:] += alive
