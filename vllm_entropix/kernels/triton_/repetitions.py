"""How much of a row's end stands before each of its tokens already: ``distribution.history.repetitions``, in one launch."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.sizes import parts

_BLOCK = 128


@triton.jit(do_not_specialize=["length"])
def _repetitions(tokens, enough, found, length, BLOCK: tl.constexpr):  # noqa: N803
    """Of a block of a row's tokens: compare backwards, all of them side by side, while any goes on."""
    row = tl.program_id(0).to(tl.int64)
    ends = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line = tokens + row * length
    most = tl.load(enough + row)
    alive = ends < length - 1
    lengths = tl.zeros([BLOCK], dtype=tl.int64)
    back = 0
    going = 1
    while going > 0:
        here = tl.load(line + ends - back, mask=alive & (ends >= back), other=-1)
        # No end is as long as the row, so that this one is a token of it.
        there = tl.load(line + tl.maximum(length - 1 - back, 0))
        alive = alive & (here >= 0) & (here == there) & (back < most)
        lengths += alive.to(tl.int64)
        going = tl.sum(alive.to(tl.int32))
        back += 1
    tl.store(found + row * (length - 1) + ends, lengths, mask=ends < length - 1)


def repetitions(tokens: Tensor, enough: Tensor) -> Tensor:
    """See ``distribution.history.repetitions``."""
    rows, length = tokens.shape
    found = torch.empty(rows, length - 1, dtype=torch.int64, device=tokens.device)
    grid = (rows, parts(length - 1, _BLOCK))
    _repetitions[grid](tokens.contiguous(), enough.to(torch.int64).contiguous(), found, length, BLOCK=_BLOCK)
    return found
