"""Logits → entropy, varentropy and log-normaliser in one read: ``sampling.metrics.LogitsMetrics.from_logits``.

A row is cut into tiles of a fixed size, so that a single row keeps a whole GPU busy. A tile gives its maximum, and normaliser,
mean and summed squared deviation relative to that; a second kernel merges the tiles of a row (Chan, Golub and LeVeque 1979).
On the way the largest logit of every small group is written down, by which ``candidates`` finds a row's largest without reading
the row again.
Nothing is computed as E[x²] - E[x]². Tiles depend on the vocabulary alone, so a row's bits don't depend on the batch.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.sizes import parts, power_of_2

TILE = 4096
_MOST_GROUPS = 2048
LN2 = tl.constexpr(0.6931471805599453)
# Differences between logits are no larger: exp() of it is 0, and 0 times it is 0, which of -inf would be NaN.
_FLOOR = tl.constexpr(-1e4)


@triton.jit
def _measure_tile(
    logits,
    row_stride,
    vocabulary,
    partial,
    tiles,
    maxima,
    maxima_stride,
    TILE: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=-float("inf")).to(tl.float32)
    bad = (x != x) | (x == float("inf"))
    # Reductions may pass over NaN, so that is told by +inf, which no usable row has.
    groups = tl.max(tl.reshape(tl.where(bad, float("inf"), x), [TILE // GROUP, GROUP]), axis=1)
    tl.store(maxima + row * maxima_stride + tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP), groups)
    maximum = tl.max(groups, axis=0)
    usable = (maximum > -float("inf")) & (maximum < float("inf"))
    shifted = tl.where(usable & (x > -float("inf")), tl.maximum(x - tl.where(usable, maximum, 0.0), _FLOOR), 0.0)
    # -inf counts 0 (D15).
    weight = tl.where(usable & (x > -float("inf")), tl.exp(shifted), 0.0)
    total = tl.sum(weight, axis=0)
    mean = tl.sum(weight * shifted, axis=0) / tl.where(usable, total, 1.0)
    deviation = shifted - mean
    spread = tl.sum(weight * deviation * deviation, axis=0)
    pointer = partial + (row * tiles + tile) * 4
    tl.store(pointer, maximum)
    tl.store(pointer + 1, total)
    tl.store(pointer + 2, mean)
    tl.store(pointer + 3, spread)


@triton.jit(do_not_specialize=["rows"])
def _merge_tiles(partial, tiles, results, rows, TILES: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    pointer, there = partial + (row * tiles + tile) * 4, tile < tiles
    maxima = tl.load(pointer, mask=there, other=-float("inf"))
    totals = tl.load(pointer + 1, mask=there, other=0.0)
    means = tl.load(pointer + 2, mask=there, other=0.0)
    spreads = tl.load(pointer + 3, mask=there, other=0.0)
    maximum = tl.max(maxima, axis=0)
    usable = (maximum > -float("inf")) & (maximum < float("inf"))
    shift = tl.where(usable & (maxima > -float("inf")), tl.maximum(maxima - tl.where(usable, maximum, 0.0), _FLOOR), 0.0)
    scale = tl.exp(shift)
    weight = totals * scale
    total = tl.sum(weight, axis=0)
    mean = tl.sum(weight * (means + shift), axis=0) / tl.where(usable, total, 1.0)
    deviation = means + shift - mean
    spread = tl.sum(spreads * scale + weight * deviation * deviation, axis=0)
    log_total = tl.log(tl.where(usable, total, 1.0))
    nan = float("nan")
    tl.store(results + row, tl.where(usable, (log_total - mean) / LN2, nan))
    tl.store(results + rows + row, tl.where(usable, spread / total / (LN2 * LN2), nan))
    tl.store(results + 2 * rows + row, tl.where(usable, maximum + log_total, nan))


@cache
def group_size(vocabulary: int) -> int:
    """How many logits share a maximum."""
    smallest: int = power_of_2(parts(vocabulary, _MOST_GROUPS))
    return min(TILE, max(16, smallest))


def buffers(rows: int, vocabulary: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """What is kept of each row between the kernels, and for those that write it: its tiles' metrics, its groups' maxima."""
    tiles = parts(vocabulary, TILE)
    return (
        torch.empty(rows, tiles, 4, dtype=torch.float32, device=device),
        torch.empty(rows, tiles * (TILE // group_size(vocabulary)), dtype=torch.float32, device=device),
    )


def logits_metrics(logits: Tensor, kept: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy (bits), varentropy (bits²) and log-normaliser of ``logits [rows, vocab]``, each float32 ``[rows]``, and maxima.

    The maxima ``[rows, groups]`` are those of :func:`group_size` logits each: +inf for a group with NaN, -inf beyond the end.

    Args:
        logits: float32, bfloat16 or float16, last dimension contiguous. -inf counts 0; a row with NaN, +inf or nothing but
            -inf gives NaN.
        kept: :func:`buffers` of as many rows or more, in which the maxima then are; None to allocate them.
    """
    rows, vocabulary = logits.shape
    tiles, group = parts(vocabulary, TILE), group_size(vocabulary)
    partial, maxima = buffers(rows, vocabulary, logits.device) if kept is None else kept
    maxima = maxima[:rows]
    results = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _measure_tile[(rows, tiles)](
            *(logits, logits.stride(0), vocabulary, partial, tiles, maxima, maxima.stride(0)),
            TILE=TILE,
            GROUP=group,
            num_warps=8,
        )
        _merge_tiles[(rows,)](partial, tiles, results, rows, power_of_2(tiles), num_warps=1)
    # Not kept for the next step: a record that waits for the draw needs the log-normaliser, and its step may come in parts.
    entropy, varentropy, log_normaliser = results.unbind()
    return entropy, varentropy, log_normaliser, maxima
