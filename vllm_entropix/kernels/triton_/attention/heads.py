"""What the shares of a context say of each head, and the heads of a layer."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.attention.compiled import kernel
from vllm_entropix.kernels.triton_.attention.launch import Launch
from vllm_entropix.kernels.triton_.attention.shares import extent

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def merge_shares(
    partial,
    lengths,
    factors,
    sinks,
    layers,
    splits,
    padded,
    layer,
    row,
    heads_found,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    SINKS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
):
    """Per query head of a row of a layer: log-normaliser, entropy and sum of absolute scores."""
    length, begin, first, last, share = extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    empty = tl.maximum(padded - (length - begin), 0).to(tl.float32)
    head, split = tl.arange(0, HEADS_2), tl.arange(0, SPLITS)
    inside = head < HEADS
    used = split * share < last - first
    mask = inside[:, None] & used[None, :]
    pointer = partial + split[None, :] * 4 * HEADS + head[:, None]
    maxima = tl.load(pointer, mask=mask, other=-float("inf"))
    totals = tl.load(pointer + HEADS, mask=mask, other=0.0)
    products = tl.load(pointer + 2 * HEADS, mask=mask, other=0.0)
    absolute = tl.load(pointer + 3 * HEADS, mask=mask, other=0.0)
    maximum = tl.max(maxima, axis=1)
    maximum = tl.where(empty > 0, tl.maximum(maximum, 0.0), maximum)
    sink = tl.full((HEADS_2,), -float("inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks + layer * HEADS + head, mask=inside, other=-float("inf"))
        maximum = tl.maximum(maximum, sink)
    there = maxima > -float("inf")
    shift = tl.where(there, maxima - maximum[:, None], 0.0)
    fade = tl.where(there, tl.exp(shift), 0.0)
    real = tl.sum(totals * fade, axis=1)
    product = tl.sum(fade * (products + shift * totals), axis=1)
    padding = tl.where(empty > 0, empty * tl.exp(-maximum), 0.0)
    normaliser = real + padding + tl.exp(sink - maximum)
    mass = (real + padding) / normaliser
    # -Σ a·ln a with a = exp(s - maximum) / normaliser; a padded slot's score is 0.
    entropy = tl.log(normaliser) * mass + maximum * (padding / normaliser) - product / normaliser
    pointer = heads_found + head
    tl.store(pointer, maximum + tl.log(normaliser), mask=inside)
    tl.store(pointer + HEADS, entropy / _LN2, mask=inside)
    tl.store(pointer + 2 * HEADS, tl.sum(absolute, axis=1), mask=inside)


@kernel
def _merge_splits(
    partial,
    lengths,
    wanted,
    factors,
    sinks,
    layers,
    rows,
    splits,
    padded,
    heads_found,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    SINKS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
):
    """What ``merge_shares`` says, of every row of a layer."""
    pair = tl.program_id(0).to(tl.int64)
    layer, row = pair // rows, pair % rows
    if tl.load(wanted + row) == 0:
        return
    merge_shares(
        partial + pair * splits * 4 * HEADS,
        lengths,
        factors,
        sinks,
        layers,
        splits,
        padded,
        layer,
        row,
        heads_found + pair * 3 * HEADS,
        HEADS,
        HEADS_2,
        SINKS,
        TILE,
        SPLITS,
        LEAST,
    )


@kernel
def _finish(
    lengths,
    wanted,
    factors,
    layers,
    rows,
    splits,
    padded,
    heads_found,
    deviations,
    results,
    RULE: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
):
    """The four statistics of a row and layer."""
    pair = tl.program_id(0).to(tl.int64)
    layer, row = pair // rows, pair % rows
    pairs = layers * rows
    if tl.load(wanted + row) == 0:
        for metric in tl.static_range(4):
            tl.store(results + metric * pairs + pair, float("nan"))
        return
    length, begin, _first, _last, _share = extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    attended = length - begin
    empty = tl.maximum(padded - attended, 0)
    head, split = tl.arange(0, HEADS_2), tl.arange(0, SPLITS)
    inside = head < HEADS
    pointer = heads_found + pair * 3 * HEADS + head
    normaliser = tl.load(pointer, mask=inside, other=0.0)
    entropy = tl.load(pointer + HEADS, mask=inside, other=0.0)
    absolute = tl.load(pointer + 2 * HEADS, mask=inside, other=0.0)
    deviation = tl.sum(tl.load(deviations + pair * splits + split, mask=split < splits, other=0.0), axis=0)
    padding = tl.where(inside & (empty > 0), tl.exp(-normaliser), 0.0)
    apart = tl.where(inside, tl.abs(padding - tl.sum(padding, axis=0) / HEADS), 0.0)
    deviation += empty.to(tl.float32) * tl.sum(apart, axis=0)
    slots = (attended + empty).to(tl.float32) * HEADS
    mean = tl.sum(entropy, axis=0) / HEADS
    variance = tl.full((), 0.0, tl.float32)
    if RULE < 2:
        apart = tl.where(inside, entropy - mean, 0.0)
        variance = tl.sum(apart * apart, axis=0) / (HEADS - RULE)
    tl.store(results + pair, mean)
    tl.store(results + pairs + pair, variance)
    tl.store(results + 2 * pairs + pair, deviation / slots)
    tl.store(results + 3 * pairs + pair, tl.sum(absolute, axis=0) / slots)


def merge(launch: Launch) -> None:
    """What each head says by itself."""
    grid = (launch.number * launch.many,)
    sinks = launch.layers.sinks
    _merge_splits[grid](
        launch.partial,
        launch.rows.lengths,
        launch.rows.wanted,
        launch.layers.factors,
        launch.layers.factors if sinks is None else sinks,
        launch.number,
        launch.many,
        launch.splits,
        launch.padded,
        launch.found,
        SINKS=sinks is not None,
        **launch.of_heads,
        num_warps=launch.warps,
    )


def finish(launch: Launch, variance_rule: int, results: Tensor | None = None) -> Tensor:
    """The statistics ``[4, layers, rows]`` of this rank's heads, which are all."""
    if results is None:
        results = torch.empty(4, launch.number, launch.many, dtype=torch.float32, device=launch.found.device)
    _finish[(launch.number * launch.many,)](
        launch.rows.lengths,
        launch.rows.wanted,
        launch.layers.factors,
        launch.number,
        launch.many,
        launch.splits,
        launch.padded,
        launch.found,
        launch.deviations,
        results,
        RULE=variance_rule,
        **launch.of_heads,
    )
    return results
