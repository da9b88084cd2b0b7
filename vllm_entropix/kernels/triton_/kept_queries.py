"""Queries of each request's last rows, copied out of the forward pass: one launch a layer, which CUDA graphs may capture."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
# A copy doesn't care what it copies.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit(do_not_specialize=["tokens", "per_request"], do_not_specialize_on_alignment=["starts"])
def _keep(queries, starts, kept, tokens, per_request, stride_token, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """Copy a request's row, counted from its last, to its index."""
    request, offset = tl.program_id(0), tl.program_id(1)
    end = tl.load(starts + request + 1).to(tl.int64)
    # A request with fewer rows, or a padded one, keeps some other row, unread.
    row = tl.minimum(tl.maximum(end - 1 - offset, 0), tokens - 1)
    index = (request * per_request + offset).to(tl.int64)
    for start in tl.static_range(0, WIDTH, BLOCK):
        element = start + tl.arange(0, BLOCK)
        values = tl.load(queries + row * stride_token + element, mask=element < WIDTH)
        tl.store(kept + index * WIDTH + element, values, mask=element < WIDTH)


def keep_queries(queries: Tensor, starts: Tensor, kept: Tensor, requests: int) -> None:
    """Write the queries of each request's last rows.

    Args:
        queries: ``[tokens, heads, head_dim]``, a token's side by side.
        starts: integers ``[at least requests + 1]``: request i's rows are [i], [i + 1) of the queries.
        kept: the same type, contiguous ``[at least requests, rows, heads, head_dim]``, written: the last row first.
        requests: how many.
    """
    bits, per_request = _BITS[queries.dtype.itemsize], kept.shape[1]
    width = kept[0, 0].numel()
    _keep[(requests, per_request)](
        queries.view(bits),
        starts,
        kept.view(bits),
        len(queries),
        per_request,
        queries.stride(0),
        WIDTH=width,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
    )
