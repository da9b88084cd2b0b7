"""Both passes in one kernel, for far more rows than find room for their scores."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton.language as tl

from vllm_entropix.kernels.triton_.attention.compiled import kernel
from vllm_entropix.kernels.triton_.attention.deviations import deviation_of_share
from vllm_entropix.kernels.triton_.attention.heads import merge_shares
from vllm_entropix.kernels.triton_.attention.launch import Launch
from vllm_entropix.kernels.triton_.attention.scores import attend_to_share
from vllm_entropix.kernels.triton_.attention.shares import extent


@kernel
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
        _length, _begin, first, last, share = extent(lengths, factors + layers, row, layer, splits, TILE, SPLITS, LEAST)
        # A row that the host's bound on lengths is wrong about takes nobody's memory.
        if (tl.load(wanted + row) != 0) & ((last - first) * (HEADS * TILE) <= room):
            shares = (last - first + share - 1) // share
            found = heads_found + pair * 3 * HEADS
            for work in tl.range(0, shares * (HEADS // GROUP), num_stages=1):
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
            merge_shares(
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
                deviation = deviation_of_share(
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


def measure_whole(launch: Launch) -> None:
    """All but :meth:`finish`."""
    tickets, sinks = launch.without[:1], launch.layers.sinks
    tickets.zero_()
    _measure_whole[(launch.programs,)](
        *launch.sources,
        launch.rows.wanted,
        launch.layers.factors if sinks is None else sinks,
        launch.padded,
        tickets,
        launch.scratch,
        launch.room,
        launch.partial,
        launch.found,
        launch.deviations,
        SINKS=sinks is not None,
        **launch.of_both,
        num_warps=launch.warps,
        # As many as three blocks leave one another; the compiler spills one, for a B200, if it isn't told.
        maxnreg=168 if launch.warps == 4 else None,
    )
