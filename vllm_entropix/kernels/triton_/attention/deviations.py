"""The second pass: scores, or keys again where none were kept, to the deviation of each head's weights from the heads' mean."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.attention.compiled import kernel
from vllm_entropix.kernels.triton_.attention.launch import Launch
from vllm_entropix.kernels.triton_.attention.scores import query_of, scores_of_tile
from vllm_entropix.kernels.triton_.attention.shares import extent
from vllm_entropix.kernels.triton_.attention.workspace import PROGRAMS


@triton.jit
def deviation_of_tile(
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
def deviation_of_share(
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
    length, begin, first, last, share = extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    start = first + split * share
    head = tl.arange(0, HEADS_2)
    normaliser = tl.load(heads_found + head, mask=head < HEADS, other=0.0)
    deviation = tl.zeros((TILE,), tl.float32)
    for tile in tl.range(start, tl.minimum(last, start + share)):
        position = tile * TILE + tl.arange(0, TILE)
        deviation += deviation_of_tile(
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


@kernel
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
    """What ``deviation_of_share`` says, of every share of every row of a layer that kept its scores."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    layer, row = pair // rows, pair % rows
    offset = tl.load(offsets + pair)
    if offset == -2:
        return
    _length, _begin, first, last, share = extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
    pointer = deviations + pair * splits + split
    if first + split * share >= last:
        tl.store(pointer, 0.0)
        return
    if offset < 0:
        return
    deviation = deviation_of_share(
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


@kernel
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
        length, begin, first, last, share = extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
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
                    query = query_of(queries, layer, query_row, kv_head, HEADS, GROUP, ROWS, HEAD_DIM, DIMS, QUERY)
                    slope = tl.load(slopes + layer * HEADS + head, mask=grouped, other=0.0) if ALIBI else cap
                    scores = scores_of_tile(
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
                deviation += deviation_of_tile(
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


def deviate(launch: Launch, sums: Tensor | None = None, starts: Tensor | None = None, ranks: int = 0) -> None:
    """Deviations from the heads' mean; arguments as ``deviation_of_tile`` says."""
    rest = (
        launch.found,
        launch.deviations if sums is None else sums,
        0 if sums is None else sums.shape[-1],
        launch.rows.lengths if starts is None else starts,
        launch.deviations,
    )
    _deviate[(launch.number * launch.many, launch.splits)](
        launch.rows.lengths,
        launch.layers.factors,
        launch.number,
        launch.many,
        launch.splits,
        launch.offsets,
        launch.scratch,
        *rest,
        RANKS=ranks,
        **launch.of_heads,
        num_warps=launch.warps,
    )
    if not launch.room_for_all:
        programs = min(PROGRAMS, launch.number * launch.many * launch.splits)
        _deviate_again[(programs,)](
            *launch.sources,
            launch.offsets,
            launch.without,
            launch.own,
            *rest,
            RANKS=ranks,
            **launch.of_both,
            num_warps=launch.warps,
        )
