"""Logits → population standard deviation of each row's finite logits in one read: ``distribution.statistics.spread``.

A tile gives how many are finite, their mean and their summed squared deviation from it; a second kernel merges the tiles of a
row (Chan, Golub and LeVeque 1979). Tiles depend on the vocabulary alone, so a row's bits don't depend on the batch.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.sizes import parts, power_of_2

TILE = 4096


@triton.jit
def _mean(values, counts):
    """Mean of ``values`` that stand for ``counts`` logits each, 0 if there are none.

    It is never beyond them, whatever rounding does: equal logits have no spread at all.
    """
    there = counts > 0
    least = tl.min(tl.where(there, values, float("inf")), axis=0)
    largest = tl.max(tl.where(there, values, -float("inf")), axis=0)
    mean = tl.sum(counts * tl.where(there, values, 0.0), axis=0) / tl.maximum(tl.sum(counts, axis=0), 1.0)
    return tl.where(least <= largest, tl.minimum(tl.maximum(mean, least), largest), 0.0)


@triton.jit
def _spread_of_tile(logits, row_stride, vocabulary, partial, tiles, TILE: tl.constexpr):  # noqa: N803
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=float("inf"))
    finite = tl.abs(x) < float("inf")
    counts = finite.to(tl.float32)
    mean = _mean(x, counts)
    deviation = tl.where(finite, x - mean, 0.0)
    pointer = partial + (row * tiles + tile) * 3
    tl.store(pointer, tl.sum(counts, axis=0))
    tl.store(pointer + 1, mean)
    tl.store(pointer + 2, tl.sum(deviation * deviation, axis=0))


@triton.jit
def _merge_spreads(partial, tiles, results, TILES: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    pointer, there = partial + (row * tiles + tile) * 3, tile < tiles
    counts = tl.load(pointer, mask=there, other=0.0)
    means = tl.load(pointer + 1, mask=there, other=0.0)
    squares = tl.load(pointer + 2, mask=there, other=0.0)
    count = tl.maximum(tl.sum(counts, axis=0), 1.0)
    apart = means - _mean(means, counts)
    tl.store(results + row, tl.sqrt(tl.sum(squares + counts * apart * apart, axis=0) / count))


def spread(logits: Tensor) -> Tensor:
    """Standard deviation of the finite ``logits [rows, vocab]``, float32 ``[rows]``; 0 where there are none.

    Args:
        logits: float32, last dimension contiguous.
    """
    rows, vocabulary = logits.shape
    tiles = parts(vocabulary, TILE)
    partial = torch.empty(rows, tiles, 3, dtype=torch.float32, device=logits.device)
    results = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _spread_of_tile[(rows, tiles)](logits, logits.stride(0), vocabulary, partial, tiles, TILE=TILE, num_warps=8)
        _merge_spreads[(rows,)](partial, tiles, results, TILES=power_of_2(tiles), num_warps=1)
    return results
