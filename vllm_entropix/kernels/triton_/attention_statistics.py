"""Queries and paged keys → attention statistics of each layer and row: ``attention.statistics.measure_layer``.

Five kernels, one launch of each for all layers that share a type and strides, however many they are:

1. ``_plan`` gives each layer's rows room for their scores, as far as there is any.
2. ``_attend`` reads keys once, a tile at a time that all query heads of a group share, and keeps scores where there is room.
3. ``_merge_splits`` adds up what the shares of a context say of each head.
4. ``_deviate`` takes kept scores, all heads of a tile at once, to the heads' mean weights and the deviation from them.
   ``_deviate_again`` does so for rows without room, whose keys it reads a second time.
5. ``_finish`` makes the four statistics.

Where there are far more rows than find room, ``_measure_whole`` stands in for all but the last of them: a program takes one row
of a layer after the other, all heads and shares of it, and needs room for one. So no key is read twice.

A context is cut into shares whose borders depend on the row alone, and whichever program takes them, the same scores are
reduced by the same code, so a row's bits are the same in any batch.

Where heads are split over tensor-parallel ranks, the ranks exchange the sums of their heads' weights between the two passes,
and what comes out is each rank's share of the statistics (``attention.ranks``).
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.ranks import RankGroup

TILE = 64
# Shares that a context is cut into at most, and tiles of a share at least.
SPLITS = 16
LEAST = 4
# Programs that share the work on rows without room: three for each multiprocessor of an H100. Of those that take whole rows,
# one for each will do, as keys would be read twice otherwise; but each has to have rows to take, or many wait in the end.
PROGRAMS = 396
FEWEST = PROGRAMS // 3
ROWS_EACH = 4
_PLANNED = tl.constexpr(1024)  # rows that are given room at a time
_LN2 = tl.constexpr(0.6931471805599453)
# All that the kernels keep between them, in float32 elements: 112 MiB. What isn't partial sums is room for scores.
WORKSPACE = 28 << 20
# What an exchange between ranks fills, in float32 elements: 32 MiB.
EXCHANGE = 8 << 20

# Integers that differ between steps or between engines, and pointers into others' buffers: of none of them takes a kernel
# variants. The addresses of keys and queries, for which alignment matters, are read from memory and checked by the host.
_NUMBERS = ("layers", "rows", "splits", "padded", "room", "table_stride", "sums_width")
_POINTERS = (
    *("queries", "addresses", "tables", "requests", "query_rows", "lengths", "wanted", "factors", "scales", "slopes", "sinks"),
    *("starts", "sums", "without"),
)

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


def _kernel(function):
    """Compile a function once for all sizes of a step."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[name for name in _NUMBERS if name in names],
        do_not_specialize_on_alignment=[name for name in _POINTERS if name in names],
    )


@dataclass(frozen=True)
class PagedLayers:
    """Layers that are measured together: their caches have one type, shape and strides.

    Attributes:
        caches: ``[blocks, kv_heads, block_size, at least head_dim]`` per layer, keys first; at addresses divisible by 16.
        addresses: int64 ``[layers]``, of the caches, on the device.
        factors: float32 ``[2, layers]``: softcap (0 for none), window (0 for none).
        scales: float32 ``[layers, kv_heads]``, on the products of queries and keys.
        alibi_slopes: float32 ``[layers, heads]`` or None.
        sinks: float32 ``[layers, heads]`` or None.
        capped: is there a softcap?
    """

    caches: tuple[Tensor, ...]
    addresses: Tensor
    factors: Tensor
    scales: Tensor
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    capped: bool = False

    def part(self, chunk: slice) -> PagedLayers:
        """Some of these layers."""
        return PagedLayers(
            self.caches[chunk],
            self.addresses[chunk],
            self.factors[:, chunk].contiguous(),
            self.scales[chunk],
            None if self.alibi_slopes is None else self.alibi_slopes[chunk],
            None if self.sinks is None else self.sinks[chunk],
            self.capped,
        )


@dataclass(frozen=True)
class PagedRows:
    """Rows that are measured together, in all layers.

    Attributes:
        queries: contiguous ``[kept, heads, head_dim]`` per layer, of one type; at addresses divisible by 16.
        query_addresses: int64 ``[layers]``, their addresses, on the device.
        query_rows: int64 ``[rows]``, where a row's queries are in each of them.
        tables: int64 ``[layers]``, on the device: addresses of the layers' block tables, int32 ``[requests, blocks]``.
        table_width: elements from a request to the next in them.
        requests: int64 ``[rows]``, the rows' requests in the block tables.
        lengths: int64 ``[rows]``, positions up to and including the row's own.
        longest: none of the lengths is greater.
        wanted: bool ``[rows]``; the others cost nothing.
        block_tables: the tensors that ``tables`` has the addresses of, to keep them.
    """

    queries: tuple[Tensor, ...]
    query_addresses: Tensor
    query_rows: Tensor
    tables: Tensor
    table_width: int
    requests: Tensor
    lengths: Tensor
    longest: int
    wanted: Tensor
    block_tables: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """How many layers, rows, heads, and the head size."""
        _, heads, head_dim = self.queries[0].shape
        return len(self.queries), len(self.lengths), heads, head_dim

    def part(self, layers: slice = slice(None), rows: slice = slice(None)) -> PagedRows:
        """Some of the rows in some of the layers."""
        return replace(
            self,
            queries=self.queries[layers],
            query_addresses=self.query_addresses[layers],
            tables=self.tables[layers],
            block_tables=self.block_tables[layers],
            query_rows=self.query_rows[rows],
            requests=self.requests[rows],
            lengths=self.lengths[rows],
            wanted=self.wanted[rows],
        )


@triton.jit
def _extent(lengths, windows, row, layer, splits, TILE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):  # noqa: N803
    """A row's length, its first position attended to, the tiles that these are in, and tiles of each share of them."""
    length = tl.load(lengths + row).to(tl.int32)
    window = tl.load(windows + layer).to(tl.int32)
    begin = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    first, last = begin // TILE, (length + TILE - 1) // TILE
    share = tl.maximum((last - first + SPLITS - 1) // SPLITS, LEAST)
    # More only if the host's bound on lengths is wrong: then there are fewer programs than shares.
    share = tl.maximum(share, (last - first + splits - 1) // splits)
    return length, begin, first, last, share


@_kernel
def _plan(
    lengths,
    wanted,
    factors,
    layers,
    rows,
    room,
    offsets,
    without,
    HEADS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    """Where each row of a layer keeps its scores: -1 for nowhere, -2 if it isn't wanted. And how many keep them nowhere."""
    layer = tl.program_id(0)
    window = tl.load(factors + layers + layer).to(tl.int32)
    taken = tl.full((), 0, tl.int64)
    missing = tl.full((), 0, tl.int32)
    for start in tl.range(0, rows, _PLANNED):
        row = start + tl.arange(0, _PLANNED)
        length = tl.load(lengths + row, mask=row < rows, other=0).to(tl.int32)
        want = tl.load(wanted + row, mask=row < rows, other=0) != 0
        begin = tl.where(window > 0, tl.maximum(length - window, 0), 0)
        tiles = (length + TILE - 1) // TILE - begin // TILE
        needed = tl.where(want, tiles, 0).to(tl.int64) * (HEADS * TILE)
        ends = taken + tl.cumsum(needed, axis=0)
        fits = ends <= room
        offset = tl.where(want, tl.where(fits, layer.to(tl.int64) * room + ends - needed, -1), -2)
        tl.store(offsets + layer * rows + row, offset, mask=row < rows)
        missing += tl.sum((want & (ends > room)).to(tl.int32), axis=0)
        taken += tl.sum(needed, axis=0)
    tl.store(without + layer, missing)


@triton.jit
def _query_of(
    queries,
    layer,
    query_row,
    kv_head,
    HEADS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    QUERY: tl.constexpr,  # noqa: N803
):
    """Queries ``[ROWS, DIMS]`` of a group of heads; rows beyond the group are padding."""
    member, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    kept = tl.multiple_of(tl.cast(tl.load(queries + layer), tl.pointer_type(QUERY)), 16)
    head = query_row * HEADS + kv_head * GROUP + member
    mask = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    query = tl.load(kept + head[:, None] * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    # Eight bits aren't multiplied as such: their products would be added with fewer bits than float32 has.
    return query.to(tl.float16) if QUERY.primitive_bitwidth == 8 else query


@triton.jit
def _scores_of_tile(
    query,
    cache,
    table,
    kv_head,
    position,
    real,
    length,
    scale,
    cap,
    slope,
    stride_block,
    stride_head,
    stride_position,
    stride_dim,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
):
    """Scores ``[ROWS, tile]`` of a group of query heads."""
    dim = tl.arange(0, DIMS)
    block = tl.load(table + position // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
    index = block * stride_block + kv_head * stride_head + (position % BLOCK_SIZE) * stride_position
    mask = real[None, :] if HEAD_DIM == DIMS else real[None, :] & (dim < HEAD_DIM)[:, None]
    keys = tl.load(cache + index[None, :] + dim[:, None] * stride_dim, mask=mask, other=0.0)
    scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee") * scale
    if SOFTCAP:
        ratio = scores / tl.where(cap > 0, cap, 1.0)
        # tanh, which is odd: of the absolute value exp() can't overflow.
        decay = tl.exp(-2.0 * tl.abs(ratio))
        bounded = cap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(cap > 0, tl.where(ratio < 0, -bounded, bounded), scores)
    if ALIBI:
        scores += slope[:, None] * (position - (length - 1)).to(tl.float32)[None, :]
    return scores


@triton.jit
def _attend_to_share(
    queries,
    addresses,
    tables,
    table_stride,
    requests,
    query_rows,
    lengths,
    factors,
    scales,
    slopes,
    layers,
    splits,
    stride_block,
    stride_head,
    stride_position,
    stride_dim,
    layer,
    row,
    kv_head,
    split,
    kept,
    keeps,
    partial,
    HEADS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    QUERY: tl.constexpr,  # noqa: N803
    ELEMENT: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
):
    """Scores of one share, key head and row of a layer, to where the row keeps them, if it does. And per query head their
    maximum, and relative to it the normaliser and the sum of score times weight; the sum of absolute scores."""
    length, begin, first, last, share = _extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    start = first + split * share
    query_row = tl.load(query_rows + row)
    query = _query_of(queries, layer, query_row, kv_head, HEADS, GROUP, ROWS, HEAD_DIM, DIMS, QUERY)
    cache = tl.multiple_of(tl.cast(tl.load(addresses + layer), tl.pointer_type(ELEMENT)), 16)
    table = tl.cast(tl.load(tables + layer), tl.pointer_type(tl.int32)) + tl.load(requests + row) * table_stride
    scale = tl.load(scales + layer * (HEADS // GROUP) + kv_head)
    cap = tl.load(factors + layer)
    member = tl.arange(0, ROWS)
    head = kv_head * GROUP + member
    grouped = member < GROUP
    slope = tl.load(slopes + layer * HEADS + head, mask=grouped, other=0.0) if ALIBI else cap
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    product = tl.zeros((ROWS,), tl.float32)
    absolute = tl.zeros((ROWS,), tl.float32)
    # Two tiles of keys, and the block numbers of a third, are on their way while one is worked on.
    for tile in tl.range(start, tl.minimum(last, start + share), num_stages=5):
        position = tile * TILE + tl.arange(0, TILE)
        # Masked by position and not by value: a stale cache block may hold NaN.
        real = (position >= begin) & (position < length)
        if QUERY.primitive_bitwidth == 32:
            # There are no registers to hold these.
            query = _query_of(queries, layer, query_row, kv_head, HEADS, GROUP, ROWS, HEAD_DIM, DIMS, QUERY)
        scores = _scores_of_tile(
            query,
            cache,
            table,
            kv_head,
            position,
            real,
            length,
            scale,
            cap,
            slope,
            stride_block,
            stride_head,
            stride_position,
            stride_dim,
            HEAD_DIM,
            DIMS,
            BLOCK_SIZE,
            SOFTCAP,
            ALIBI,
        )
        index = ((tile - first) * HEADS + head)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(kept + index, scores, mask=(grouped & keeps)[:, None])
        masked = tl.where(real[None, :], scores, -float("inf"))
        higher = tl.maximum(maximum, tl.max(masked, axis=1))
        shift = tl.where(maximum > -float("inf"), maximum - higher, 0.0)
        fade = tl.where(maximum > -float("inf"), tl.exp(shift), 0.0)
        relative = tl.where(real[None, :], scores - higher[:, None], 0.0)
        weight = tl.where(real[None, :], tl.exp(relative), 0.0)
        product = fade * (product + shift * total) + tl.sum(weight * relative, axis=1)
        total = fade * total + tl.sum(weight, axis=1)
        absolute += tl.sum(tl.where(real[None, :], tl.abs(scores), 0.0), axis=1)
        maximum = higher
    pointer = partial + split * 4 * HEADS + head
    tl.store(pointer, maximum, mask=grouped)
    tl.store(pointer + HEADS, total, mask=grouped)
    tl.store(pointer + 2 * HEADS, product, mask=grouped)
    tl.store(pointer + 3 * HEADS, absolute, mask=grouped)


@_kernel
def _attend(
    queries,
    addresses,
    tables,
    table_stride,
    requests,
    query_rows,
    lengths,
    factors,
    scales,
    slopes,
    layers,
    rows,
    splits,
    stride_block,
    stride_head,
    stride_position,
    stride_dim,
    offsets,
    scratch,
    partial,
    HEADS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    QUERY: tl.constexpr,  # noqa: N803
    ELEMENT: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
):
    """What ``_attend_to_share`` says, of every share, key head and row of a layer."""
    pair, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    layer, row = pair // rows, pair % rows
    offset = tl.load(offsets + pair)
    if offset == -2:
        return
    _length, _begin, first, last, share = _extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    if first + split * share >= last:
        return
    _attend_to_share(
        queries,
        addresses,
        tables,
        table_stride,
        requests,
        query_rows,
        lengths,
        factors,
        scales,
        slopes,
        layers,
        splits,
        stride_block,
        stride_head,
        stride_position,
        stride_dim,
        layer,
        row,
        kv_head,
        split,
        scratch + tl.multiple_of(tl.maximum(offset, 0), 16),
        offset >= 0,
        partial + pair * splits * 4 * HEADS,
        HEADS,
        GROUP,
        ROWS,
        HEAD_DIM,
        DIMS,
        BLOCK_SIZE,
        QUERY,
        ELEMENT,
        SOFTCAP,
        ALIBI,
        TILE,
        SPLITS,
        LEAST,
    )


@triton.jit
def _merge_shares(
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
    length, begin, first, last, share = _extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
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


@_kernel
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
    """What ``_merge_shares`` says, of every row of a layer."""
    pair = tl.program_id(0).to(tl.int64)
    layer, row = pair // rows, pair % rows
    if tl.load(wanted + row) == 0:
        return
    _merge_shares(
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


@triton.jit
def _deviation_of_tile(
    kept,
    normaliser,
    position,
    real,
    begin,
    row,
    layer,
    layers,
    rows,
    sums,
    sums_width,
    starts,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    """Summed deviation ``[tile]`` of all heads' weights from their mean, by the tile's scores, ``[HEADS, tile]`` at ``kept``.

    With RANKS 0 this rank has all heads. With more, ``sums [ranks, layers, sums_width]`` has the sums over each rank's heads,
    this one's among them; a row's begin at its ``starts``. With RANKS -1 this rank's sums are written there, and are returned.
    """
    head, slot = tl.arange(0, HEADS_2), tl.arange(0, TILE)
    inside = (head < HEADS)[:, None] & real[None, :]
    # Slots that hold nothing are left out below: a mask by position would have them read one by one.
    scores = tl.load(kept + head[:, None] * TILE + slot[None, :], mask=(head < HEADS)[:, None], other=0.0)
    weight = tl.where(inside, tl.exp(scores - normaliser[:, None]), 0.0)
    total = tl.sum(weight, axis=0)
    if RANKS != 0:
        shared = tl.load(starts + row) + position - begin
        # No more than there is room for, however wrong the host's bound might be.
        fits = real & (shared < sums_width - rows)
        if RANKS < 0:
            tl.store(sums + layer * sums_width + shared, total, mask=fits)
            return total
        total = tl.zeros((TILE,), tl.float32)
        for rank in tl.range(0, RANKS):  # in their order, so that all ranks get the same bits
            total += tl.load(sums + (rank * layers + layer) * sums_width + shared, mask=fits, other=0.0)
    mean = total / (HEADS * RANKS if RANKS > 0 else HEADS)
    return tl.sum(tl.where(inside, tl.abs(weight - mean[None, :]), 0.0), axis=0)


@triton.jit
def _deviation_of_share(
    lengths,
    factors,
    layers,
    rows,
    splits,
    layer,
    row,
    split,
    kept,
    heads_found,
    sums,
    sums_width,
    starts,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
):
    """Summed deviation of all heads' weights from their mean, over one share of a row that kept its scores."""
    length, begin, first, last, share = _extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    start = first + split * share
    head = tl.arange(0, HEADS_2)
    normaliser = tl.load(heads_found + head, mask=head < HEADS, other=0.0)
    deviation = tl.zeros((TILE,), tl.float32)
    for tile in tl.range(start, tl.minimum(last, start + share)):
        position = tile * TILE + tl.arange(0, TILE)
        deviation += _deviation_of_tile(
            kept + (tile - first) * (HEADS * TILE),
            normaliser,
            position,
            (position >= begin) & (position < length),
            begin,
            row,
            layer,
            layers,
            rows,
            sums,
            sums_width,
            starts,
            HEADS,
            HEADS_2,
            RANKS,
            TILE,
        )
    return tl.sum(deviation, axis=0)


@_kernel
def _deviate(
    lengths,
    factors,
    layers,
    rows,
    splits,
    offsets,
    scratch,
    heads_found,
    sums,
    sums_width,
    starts,
    deviations,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
):
    """What ``_deviation_of_share`` says, of every share of every row of a layer that kept its scores."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    layer, row = pair // rows, pair % rows
    offset = tl.load(offsets + pair)
    if offset == -2:
        return
    _length, _begin, first, last, share = _extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    pointer = deviations + pair * splits + split
    if first + split * share >= last:
        tl.store(pointer, 0.0)
        return
    if offset < 0:
        return
    deviation = _deviation_of_share(
        lengths,
        factors,
        layers,
        rows,
        splits,
        layer,
        row,
        split,
        scratch + tl.multiple_of(offset, 16),
        heads_found + pair * 3 * HEADS,
        sums,
        sums_width,
        starts,
        HEADS,
        HEADS_2,
        TILE,
        SPLITS,
        LEAST,
        RANKS,
    )
    tl.store(pointer, deviation)


@_kernel
def _deviate_again(
    queries,
    addresses,
    tables,
    table_stride,
    requests,
    query_rows,
    lengths,
    factors,
    scales,
    slopes,
    layers,
    rows,
    splits,
    stride_block,
    stride_head,
    stride_position,
    stride_dim,
    offsets,
    without,
    own,
    heads_found,
    sums,
    sums_width,
    starts,
    deviations,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    QUERY: tl.constexpr,  # noqa: N803
    ELEMENT: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
):
    """The same for all shares of rows that found no room: a tile's scores are computed again, into the program's ``own``
    ``[HEADS, tile]``, which never leaves the cache."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    missing = tl.zeros((), tl.int32)
    for block in tl.range(0, layers, 128):
        index = block + tl.arange(0, 128)
        missing += tl.sum(tl.load(without + index, mask=index < layers, other=0), axis=0)
    if missing == 0:
        return
    kept = own + program * (HEADS * TILE)
    member, all_heads = tl.arange(0, ROWS), tl.arange(0, HEADS_2)
    grouped = member < GROUP
    for work in tl.range(program, layers * rows * splits, programs, num_stages=1):
        pair, split = (work // splits).to(tl.int64), work % splits
        layer, row = pair // rows, pair % rows
        length, begin, first, last, share = _extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
        start = first + split * share
        if (tl.load(offsets + pair) == -1) & (start < last):
            query_row = tl.load(query_rows + row)
            cache = tl.multiple_of(tl.cast(tl.load(addresses + layer), tl.pointer_type(ELEMENT)), 16)
            table = tl.cast(tl.load(tables + layer), tl.pointer_type(tl.int32)) + tl.load(requests + row) * table_stride
            cap = tl.load(factors + layer)
            normaliser = tl.load(heads_found + pair * 3 * HEADS + all_heads, mask=all_heads < HEADS, other=0.0)
            deviation = tl.zeros((TILE,), tl.float32)
            for tile in tl.range(start, tl.minimum(last, start + share), num_stages=1):
                position = tile * TILE + tl.arange(0, TILE)
                real = (position >= begin) & (position < length)
                for kv_head in tl.range(0, HEADS // GROUP, num_stages=3):
                    head = kv_head * GROUP + member
                    query = _query_of(queries, layer, query_row, kv_head, HEADS, GROUP, ROWS, HEAD_DIM, DIMS, QUERY)
                    slope = tl.load(slopes + layer * HEADS + head, mask=grouped, other=0.0) if ALIBI else cap
                    scores = _scores_of_tile(
                        query,
                        cache,
                        table,
                        kv_head,
                        position,
                        real,
                        length,
                        tl.load(scales + layer * (HEADS // GROUP) + kv_head),
                        cap,
                        slope,
                        stride_block,
                        stride_head,
                        stride_position,
                        stride_dim,
                        HEAD_DIM,
                        DIMS,
                        BLOCK_SIZE,
                        SOFTCAP,
                        ALIBI,
                    )
                    tl.store(kept + head[:, None] * TILE + tl.arange(0, TILE)[None, :], scores, mask=grouped[:, None])
                tl.debug_barrier()  # what one thread wrote, another reads
                deviation += _deviation_of_tile(
                    kept,
                    normaliser,
                    position,
                    real,
                    begin,
                    row,
                    layer,
                    layers,
                    rows,
                    sums,
                    sums_width,
                    starts,
                    HEADS,
                    HEADS_2,
                    RANKS,
                    TILE,
                )
                tl.debug_barrier()
            tl.store(deviations + pair * splits + split, tl.sum(deviation, axis=0))


@_kernel
def _measure_whole(
    queries,
    addresses,
    tables,
    table_stride,
    requests,
    query_rows,
    lengths,
    factors,
    scales,
    slopes,
    layers,
    rows,
    splits,
    stride_block,
    stride_head,
    stride_position,
    stride_dim,
    wanted,
    sinks,
    padded,
    tickets,
    own,
    room,
    partial,
    heads_found,
    deviations,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    SINKS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    QUERY: tl.constexpr,  # noqa: N803
    ELEMENT: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    LEAST: tl.constexpr,  # noqa: N803
):
    """All that the kernels above do, but of a row and layer by one program, which keeps scores where it kept those of the one
    before: in ``room`` numbers of its ``own``. Programs take the next row as they get done."""
    program = tl.program_id(0).to(tl.int64)
    kept = own + tl.multiple_of(program * room, 16)
    partial += program * splits * 4 * HEADS
    ticket = tl.atomic_add(tickets, 1)
    while ticket < layers * rows:
        # A GPU divides 64 bits in a function of its own.
        pair, layer, row = ticket.to(tl.int64), (ticket // rows).to(tl.int64), (ticket % rows).to(tl.int64)
        _length, _begin, first, last, share = _extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
        # A row that the host's bound on lengths is wrong about takes nobody's memory.
        if (tl.load(wanted + row) != 0) & ((last - first) * (HEADS * TILE) <= room):
            shares = (last - first + share - 1) // share
            found = heads_found + pair * 3 * HEADS
            for work in tl.range(0, shares * (HEADS // GROUP), num_stages=1):
                _attend_to_share(
                    queries,
                    addresses,
                    tables,
                    table_stride,
                    requests,
                    query_rows,
                    lengths,
                    factors,
                    scales,
                    slopes,
                    layers,
                    splits,
                    stride_block,
                    stride_head,
                    stride_position,
                    stride_dim,
                    layer,
                    row,
                    work // shares,
                    work % shares,
                    kept,
                    True,
                    partial,
                    HEADS,
                    GROUP,
                    ROWS,
                    HEAD_DIM,
                    DIMS,
                    BLOCK_SIZE,
                    QUERY,
                    ELEMENT,
                    SOFTCAP,
                    ALIBI,
                    TILE,
                    SPLITS,
                    LEAST,
                )
            tl.debug_barrier()  # what one thread wrote, another reads
            _merge_shares(
                partial,
                lengths,
                factors,
                sinks,
                layers,
                splits,
                padded,
                layer,
                row,
                found,
                HEADS,
                HEADS_2,
                SINKS,
                TILE,
                SPLITS,
                LEAST,
            )
            tl.debug_barrier()
            for split in tl.range(0, splits, num_stages=1):
                # Without any tile in what is no share.
                deviation = _deviation_of_share(
                    lengths,
                    factors,
                    layers,
                    rows,
                    splits,
                    layer,
                    row,
                    split,
                    kept,
                    found,
                    deviations,
                    0,
                    lengths,
                    HEADS,
                    HEADS_2,
                    TILE,
                    SPLITS,
                    LEAST,
                    0,
                )
                tl.store(deviations + pair * splits + split, deviation)
            tl.debug_barrier()
        ticket = tl.atomic_add(tickets, 1)


@_kernel
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
    length, begin, _first, _last, _share = _extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
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


def supports(dtype: torch.dtype) -> bool:
    """Are keys of this type read?"""
    return dtype in _TYPES


@dataclass(frozen=True)
class Workspace:
    """What the kernels keep between them, allocated once.

    Attributes:
        buffer: float32, any number of elements.
    """

    buffer: Tensor

    @classmethod
    def for_steps(cls, layers: int, rows: int, heads: int, longest: int, device: torch.device) -> Workspace:
        """As much as steps of at most this size need, or as there may be.

        Args:
            layers: measured together.
            rows: in a step.
            heads: of a layer.
            longest: positions of a sequence.
            device: the keys' own.
        """
        return cls(torch.empty(workspace_size(layers, rows, heads, longest), dtype=torch.float32, device=device))


def splits_of(longest: int) -> int:
    """Shares that a context of this many positions is cut into."""
    return max(1, min(SPLITS, -(-longest // (TILE * LEAST))))


def workspace_size(layers: int, rows: int, heads: int, longest: int) -> int:
    """float32 elements of a workspace; arguments as of ``Workspace.for_steps``."""
    scores = layers * rows * heads * -(-longest // TILE) * TILE
    return min(WORKSPACE, sum(_sizes(layers, rows, heads, splits_of(longest)).values()) + scores)


def rows_together(layers: int, rows: int, heads: int, longest: int, workspace: int) -> int:
    """Rows of one launch: all, unless what is kept of them beside scores needs more than the workspace has.

    Args:
        layers: measured together.
        rows: of the step.
        heads: of a layer.
        longest: positions of a sequence.
        workspace: its float32 elements.
    """
    splits = splits_of(longest)
    parts = range(1, rows + 1)
    sizes = (-(-rows // part) for part in parts)
    return next((size for size in sizes if sum(_sizes(layers, size, heads, splits).values()) <= workspace), 1)


def programs_for_whole_rows(layers: int, rows: int, heads: int, longest: int, workspace: int) -> int:
    """Programs that take whole rows, each with room for the scores of one; 0 where rows are better shared by programs.

    Args:
        layers: measured together.
        rows: of a launch.
        heads: of a layer.
        longest: positions of a row.
        workspace: its float32 elements.
    """
    splits, pairs, of_one = splits_of(longest), layers * rows, heads * -(-longest // TILE) * TILE
    if sum(_sizes(layers, rows, heads, splits).values()) + pairs * of_one <= workspace:
        return 0
    programs = min(PROGRAMS, (workspace - sum(_sizes(layers, rows, heads, splits, whole=True).values())) // of_one)
    return programs if programs >= FEWEST and pairs >= ROWS_EACH * programs else 0


def _sizes(layers: int, rows: int, heads: int, splits: int, whole: bool = False) -> dict[str, int]:
    """What is kept beside scores, in float32 elements: multiples of 16 bytes each. Are whole rows taken?"""
    pairs = layers * rows
    needed = {
        "offsets": 2 * pairs,  # int64
        "without": layers,
        "partial": (PROGRAMS if whole else pairs) * splits * 4 * heads,
        "found": pairs * 3 * heads,
        "deviations": pairs * splits,
        "own": 0 if whole else PROGRAMS * heads * TILE,
    }
    return {name: -(-size // 4) * 4 for name, size in needed.items()}


def attention_statistics(
    layers: PagedLayers, rows: PagedRows, padded: int, variance_rule: int, workspace: Workspace | None = None
) -> Tensor:
    """Entropy, varentropy over heads, agreement and interaction, float32 ``[4, layers, rows]``; NaN for rows not wanted.

    Args:
        layers: where the keys are, and how they become scores.
        rows: what is measured.
        padded: slots that count at least, with score 0 (D2); 0 for none.
        variance_rule: 0 over heads, 1 with Bessel's correction, 2 zero.
        workspace: what steps of this size need; None to allocate it.
    """
    number, many, heads, _ = rows.shape
    device = rows.lengths.device
    results = torch.empty(4, number, many, dtype=torch.float32, device=device)
    if not results.numel():
        return results
    workspace = workspace or Workspace.for_steps(number, many, heads, rows.longest, device)
    together = rows_together(number, many, heads, rows.longest, workspace.buffer.numel())
    for start in range(0, many, together):
        chunk = slice(start, start + together)
        here = rows if together == many else rows.part(rows=chunk)
        programs = programs_for_whole_rows(number, len(here.lengths), heads, rows.longest, workspace.buffer.numel())
        launches = _Launches(layers, here, padded, workspace, programs)
        if programs:
            launches.measure_whole()
        else:
            launches.attend()
            launches.deviate()
        found = launches.finish(variance_rule, results if together == many else None)
        if together < many:
            results[:, :, chunk] = found
    return results


def head_shares(
    layers: PagedLayers,
    rows: PagedRows,
    padded: int,
    attended: Tensor,
    total: int,
    longest: int,
    ranks: RankGroup,
    workspace: Workspace | None = None,
    exchange: Tensor | None = None,
) -> Tensor:
    """A rank's share of the statistics, as ``attention.ranks.combine_shares`` takes it: float32 ``[layers, rows, heads + 2]``.

    Exchanges the sums of weights once, or more often if memory doesn't allow that. Rows that aren't wanted get anything.
    What is exchanged depends on what the host knows, so all ranks do it alike.

    Args:
        layers: of this rank; ``queries`` and caches have its heads alone.
        rows: what is measured.
        padded: slots that count at least, with score 0 (D2); 0 for none.
        attended: int64 ``[rows]``, positions that a wanted row attends to in each of the layers, 0 for the others.
        total: their sum or more; the host has to know it.
        longest: none of them is greater.
        ranks: that have the other heads.
        workspace: what steps of this size need; None to allocate it.
        exchange: float32, of ``exchange_size`` elements for steps of this size; None to allocate it.
    """
    number, many, heads, _ = rows.shape
    device = rows.lengths.device
    shares = torch.empty(number, many, heads + 2, dtype=torch.float32, device=device)
    if not shares.numel():
        return shares
    if exchange is None:
        exchange = torch.empty(exchange_size(number, many, longest, ranks.size), dtype=torch.float32, device=device)
    layers_at_once, rows_at_once = exchanged_together(number, many, heads, total, longest, ranks.size, exchange.numel())
    workspace = workspace or Workspace.for_steps(layers_at_once, rows_at_once, heads, rows.longest, device)
    for first_row in range(0, many, rows_at_once):
        chosen = slice(first_row, first_row + rows_at_once)
        here = attended[chosen]
        starts = here.cumsum(0) - here
        positions = min(total, len(here) * longest)
        for first in range(0, number, layers_at_once):
            chunk = slice(first, min(first + layers_at_once, number))
            launches = _Launches(layers.part(chunk), rows.part(chunk, chosen), padded, workspace)
            launches.attend()
            shape = (ranks.size, chunk.stop - chunk.start, positions + len(here))
            everything = exchange[: math.prod(shape)].view(shape)
            launches.sums(everything[ranks.rank], starts)
            ranks.complete(everything.flatten(1))
            shares[chunk, chosen] = launches.shares(everything, starts)
    return shares


def exchange_size(layers: int, rows: int, longest: int, ranks: int) -> int:
    """float32 elements that exchanges of steps of at most this size fill: ``EXCHANGE`` at most, unless one row needs more.

    Args:
        layers: of a step.
        rows: of a step.
        longest: positions that a row attends to.
        ranks: how many.
    """
    of_a_row = ranks * (longest + 1)
    return min(layers * rows * of_a_row, max(EXCHANGE, of_a_row))


def exchanged_together(layers: int, rows: int, heads: int, total: int, longest: int, ranks: int, room: int) -> tuple[int, int]:
    """Layers and rows of one exchange of sums: all, unless memory for what is exchanged or kept doesn't allow that.

    Args:
        layers: of a step.
        rows: of a step.
        heads: of this rank.
        total: positions that the rows attend to.
        longest: that a row attends to.
        ranks: how many.
        room: for what all ranks send, in float32 elements.
    """
    if ranks * (total + rows) > room:
        # The host knows no more of some of the rows than that none is longer.
        return 1, max(1, min(rows, room // (ranks * (longest + 1))))
    shared = sum(_sizes(0, 0, heads, SPLITS).values())
    per_layer = sum(_sizes(1, rows, heads, SPLITS).values()) - shared
    return max(1, min(layers, room // (ranks * (total + rows)), (WORKSPACE - shared) // per_layer)), rows


class _Launches:
    """The launches for some layers and rows, in their order, and what they share; ``programs`` that take whole rows, or 0."""

    def __init__(self, layers: PagedLayers, rows: PagedRows, padded: int, workspace: Workspace, programs: int = 0) -> None:
        number, many, heads, head_dim = rows.shape
        cache = layers.caches[0]
        kv_heads = cache.shape[1]
        splits = splits_of(rows.longest)
        self._layers, self._rows, self._padded, self._heads = layers, rows, padded, heads
        self._number, self._many, self._splits, self._programs = number, many, splits, programs
        sizes = _sizes(number, many, heads, splits, programs > 0)
        parts = dict(zip(sizes, _carved(workspace.buffer, list(sizes.values())), strict=True))
        of_row = heads * (-(-rows.longest // TILE) * TILE)
        # Of a program that takes whole rows, or of a layer.
        self._room = of_row if programs else (workspace.buffer.numel() - sum(sizes.values())) // number // TILE * TILE
        self._scratch = workspace.buffer[sum(sizes.values()) :]
        self._offsets, self._without = parts["offsets"].view(torch.int64), parts["without"].view(torch.int32)
        self._partial, self._own = parts["partial"], parts["own"]
        self._found = parts["found"][: number * many * 3 * heads].view(-1, 3, heads)
        self._deviations = parts["deviations"][: number * many * splits].view(-1, splits)
        # Never read where the constants say that there are none.
        slopes = layers.factors if layers.alibi_slopes is None else layers.alibi_slopes
        self._sources = (
            *(rows.query_addresses, layers.addresses, rows.tables, rows.table_width, rows.requests, rows.query_rows),
            *(rows.lengths, layers.factors, layers.scales, slopes, number, many, splits, *cache.stride()),
        )
        group = heads // kv_heads
        self._cut = {"TILE": TILE, "SPLITS": SPLITS, "LEAST": LEAST}
        self._shape = {
            **self._cut,
            "HEADS": heads,
            "GROUP": group,
            # The least that a matrix product takes.
            "ROWS": max(16, triton.next_power_of_2(group)),
            "HEAD_DIM": head_dim,
            "DIMS": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_SIZE": cache.shape[2],
            "QUERY": _TYPES[rows.queries[0].dtype],
            "ELEMENT": _TYPES[cache.dtype],
            "SOFTCAP": layers.capped,
            "ALIBI": layers.alibi_slopes is not None,
        }
        # So many that a thread's share of a tile fits its registers (test_machine_code_attention.py).
        wide = self._shape["ROWS"] > 16 or rows.queries[0].dtype == torch.float32
        # Sums are spread over as many in all kernels, so that they come to the same bits.
        self._warps = 16 if self._shape["ROWS"] > 64 else 8 if wide else 4
        self._of_heads = {**self._cut, "HEADS": heads, "HEADS_2": triton.next_power_of_2(heads)}
        # Room for the scores of all rows, whichever they are: then none is without.
        self._room_for_all = self._room >= many * of_row

    def measure_whole(self) -> None:
        """All but :meth:`finish`."""
        tickets, sinks = self._without[:1], self._layers.sinks
        tickets.zero_()
        _measure_whole[(self._programs,)](
            *self._sources,
            self._rows.wanted,
            self._layers.factors if sinks is None else sinks,
            self._padded,
            tickets,
            self._scratch,
            self._room,
            self._partial,
            self._found,
            self._deviations,
            SINKS=sinks is not None,
            **(self._shape | self._of_heads),
            num_warps=self._warps,
            # As many as three blocks leave one another; the compiler spills one, for a B200, if it isn't told.
            maxnreg=168 if self._warps == 4 else None,
        )

    def attend(self) -> None:
        """Scores, and what each head says by itself."""
        rows, factors = self._rows, self._layers.factors
        _plan[(self._number,)](
            *(rows.lengths, rows.wanted, factors, self._number, self._many, self._room, self._offsets, self._without),
            HEADS=self._heads,
            TILE=TILE,
        )
        grid = (self._number * self._many, self._heads // self._shape["GROUP"], self._splits)
        _attend[grid](*self._sources, self._offsets, self._scratch, self._partial, **self._shape, num_warps=self._warps)
        sinks = self._layers.sinks
        _merge_splits[grid[:1]](
            self._partial,
            self._rows.lengths,
            self._rows.wanted,
            self._layers.factors,
            self._layers.factors if sinks is None else sinks,
            self._number,
            self._many,
            self._splits,
            self._padded,
            self._found,
            SINKS=sinks is not None,
            **self._of_heads,
            num_warps=self._warps,
        )

    def deviate(self, sums: Tensor | None = None, starts: Tensor | None = None, ranks: int = 0) -> None:
        """Deviations from the heads' mean; arguments as ``_deviation_of_tile`` says."""
        rest = (
            self._found,
            self._deviations if sums is None else sums,
            0 if sums is None else sums.shape[-1],
            self._rows.lengths if starts is None else starts,
            self._deviations,
        )
        _deviate[(self._number * self._many, self._splits)](
            self._rows.lengths,
            self._layers.factors,
            self._number,
            self._many,
            self._splits,
            self._offsets,
            self._scratch,
            *rest,
            RANKS=ranks,
            **self._of_heads,
            num_warps=self._warps,
        )
        if not self._room_for_all:
            programs = min(PROGRAMS, self._number * self._many * self._splits)
            _deviate_again[(programs,)](
                *self._sources,
                self._offsets,
                self._without,
                self._own,
                *rest,
                RANKS=ranks,
                **(self._shape | self._of_heads),
                num_warps=self._warps,
            )

    def finish(self, variance_rule: int, results: Tensor | None = None) -> Tensor:
        """The statistics ``[4, layers, rows]`` of this rank's heads, which are all."""
        if results is None:
            results = torch.empty(4, self._number, self._many, dtype=torch.float32, device=self._found.device)
        _finish[(self._number * self._many,)](
            self._rows.lengths,
            self._rows.wanted,
            self._layers.factors,
            self._number,
            self._many,
            self._splits,
            self._padded,
            self._found,
            self._deviations,
            results,
            RULE=variance_rule,
            **self._of_heads,
        )
        return results

    def sums(self, sums: Tensor, starts: Tensor) -> None:
        """Fill ``[layers, total + rows]`` with sums over this rank's heads: of weights by position, then of padded slots."""
        self.deviate(sums, starts, -1)
        sums[:, -self._many :] = self._padding()[1].sum(dim=-1).view(self._number, self._many)

    def shares(self, sums: Tensor, starts: Tensor) -> Tensor:
        """This rank's shares ``[layers, rows, heads + 2]``, by the sums of all, ``[ranks, layers, total + rows]``."""
        ranks = len(sums)
        self.deviate(sums, starts, ranks)
        empty, padding = self._padding()
        mean = sums[:, :, -self._many :].sum(dim=0).view(-1, 1) / (self._heads * ranks)
        deviation = self._deviations.sum(dim=-1) + empty * (padding - mean).abs().sum(dim=-1)
        absolute = self._found[:, 2].sum(dim=-1)
        means = torch.stack((absolute, deviation), dim=-1) / self._heads
        shares = torch.cat((self._found[:, 1], means), dim=-1)
        return shares.view(-1, self._many, self._heads + 2)

    def _padding(self) -> tuple[Tensor, Tensor]:
        """Padded slots ``[pairs]``, and the weight that each head gives one of them, ``[pairs, heads]``."""
        windows = self._layers.factors[1].to(torch.int64).unsqueeze(-1)
        attended = torch.where(windows > 0, self._rows.lengths.minimum(windows), self._rows.lengths)
        empty = (self._padded - attended.flatten()).clamp_min(0)
        return empty, torch.where(empty.unsqueeze(-1) > 0, (-self._found[:, 0]).exp(), 0.0)


def _carved(buffer: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The first parts of a buffer."""
    start = 0
    for size in sizes:
        yield buffer[start : start + size]
        start += size
