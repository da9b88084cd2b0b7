"""Queries of each request's last rows, copied out of the forward pass: one launch a layer, which CUDA graphs may capture.

One more finds where a row's queries are among them.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.sizes import parts, power_of_2

_BLOCK = 2048
_ROWS = 32
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
        BLOCK=min(_BLOCK, power_of_2(width)),
    )


_FOUND = ("requests", "positions", "ends", "query_rows", "lengths", "rows", "per_request")


@triton.jit(do_not_specialize=_FOUND)
def _find(requests, positions, ends, query_rows, lengths, rows, per_request, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    request = tl.load(requests + row, mask=there, other=0).to(tl.int64)
    length = tl.load(positions + row, mask=there, other=0).to(tl.int64) + 1
    before_last = tl.load(ends + request, mask=there, other=0).to(tl.int64) - length
    offset = tl.minimum(tl.maximum(before_last, 0), per_request - 1)
    tl.store(query_rows + row, request * per_request + offset, mask=there)
    tl.store(lengths + row, length, mask=there)


def rows_of_queries(requests: Tensor, positions: Tensor, ends: Tensor, per_request: int) -> tuple[Tensor, Tensor]:
    """Which of a layer's kept queries are those of some rows, and the rows' lengths: int64 ``[rows]`` each.

    Args:
        requests: int64 ``[rows]``, the rows' requests.
        positions: int64 ``[rows]``, in their sequences.
        ends: integers ``[requests]``, each request's length after its last row.
        per_request: how many rows are kept of each.
    """
    query_rows, lengths = torch.empty_like(requests), torch.empty_like(positions)
    rows = len(requests)
    _find[(parts(rows, _ROWS),)](*(requests, positions, ends, query_rows, lengths, rows, per_request), BLOCK=_ROWS, num_warps=1)
    return query_rows, lengths
