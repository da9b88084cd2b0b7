"""The first pass: keys once, to scores and to what each share of a context says of each head."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from vllm_entropix.kernels.triton_.attention.compiled import kernel
from vllm_entropix.kernels.triton_.attention.launch import Launch
from vllm_entropix.kernels.triton_.attention.shares import TILE, extent

_PLANNED = tl.constexpr(1024)  # rows that are given room at a time


@kernel
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
def query_of(
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
def scores_of_tile(
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
def attend_to_share(
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
    length, begin, first, last, share = extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    start = first + split * share
    query_row = tl.load(query_rows + row)
    query = query_of(queries, layer, query_row, kv_head, HEADS, GROUP, ROWS, HEAD_DIM, DIMS, QUERY)
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
            query = query_of(queries, layer, query_row, kv_head, HEADS, GROUP, ROWS, HEAD_DIM, DIMS, QUERY)
        scores = scores_of_tile(
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


@kernel
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
    """What ``attend_to_share`` says, of every share, key head and row of a layer."""
    pair, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    layer, row = pair // rows, pair % rows
    offset = tl.load(offsets + pair)
    if offset == -2:
        return
    _length, _begin, first, last, share = extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    if first + split * share >= last:
        return
    attend_to_share(
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


def attend(launch: Launch) -> None:
    """Scores, and what each share says of each head."""
    rows, factors = launch.rows, launch.layers.factors
    _plan[(launch.number,)](
        *(rows.lengths, rows.wanted, factors, launch.number, launch.many, launch.room, launch.offsets, launch.without),
        HEADS=launch.heads,
        TILE=TILE,
    )
    grid = (launch.number * launch.many, launch.heads // launch.shape["GROUP"], launch.splits)
    _attend[grid](*launch.sources, launch.offsets, launch.scratch, launch.partial, **launch.shape, num_warps=launch.warps)
