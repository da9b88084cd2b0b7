"""Queries and paged keys → attention statistics of each layer and row: ``attention.statistics.measure_layer``.

Keys are read once, a tile at a time that all query heads of a group share. Their scores go to a scratch of bounded size, from
which the heads' mean weights, and each head's deviation from them, are computed when the normalisers are known. A row that
finds no room in the scratch has its scores computed again; its bits are the same. The context is cut into a fixed number of
splits whose borders depend on the row alone. One launch covers all layers, as far as the scratch goes for a typical context.

Where heads are split over tensor-parallel ranks, the ranks exchange the sums of their heads' weights between the two passes,
and what comes out is each rank's share of the statistics (``attention.ranks``).
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.ranks import RankGroup

TILE = 64
SPLITS = 16
_LN2 = tl.constexpr(0.6931471805599453)
# Size of the scratch, in float32 elements: 128 MiB.
_SCRATCH = 1 << 25
# Size of what is received in an exchange between ranks, in float32 elements: 256 MiB.
_EXCHANGE = 1 << 26
# Longer contexts may find no room in the scratch if all rows have them.
_TYPICAL_CONTEXT = 4096

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


@dataclass(frozen=True)
class PagedLayers:
    """Layers that are measured together: their caches have one type, shape and strides.

    Attributes:
        caches: ``[blocks, kv_heads, block_size, at least head_dim]`` per layer, keys first.
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
        queries: ``[layers, rows, heads, head_dim]``, contiguous.
        tables: int64 ``[layers]``, on the device: addresses of the layers' block tables, int32 ``[requests, blocks]``.
        table_width: elements from a request to the next in them.
        requests: int64 ``[rows]``, the rows' requests in the block tables.
        lengths: int64 ``[rows]``, positions up to and including the row's own.
        wanted: bool ``[rows]``; the others cost nothing.
        block_tables: the tensors that ``tables`` has the addresses of, to keep them.
    """

    queries: Tensor
    tables: Tensor
    table_width: int
    requests: Tensor
    lengths: Tensor
    wanted: Tensor
    block_tables: tuple[Tensor, ...]

    def part(self, layers: slice) -> PagedRows:
        """In some of the layers."""
        return replace(self, queries=self.queries[layers], tables=self.tables[layers], block_tables=self.block_tables[layers])


@triton.jit
def _extent(lengths, windows, row, layer, TILE: tl.constexpr):  # noqa: N803
    """A row's length, its first position attended to, and the tiles that these are in."""
    length = tl.load(lengths + row).to(tl.int32)
    window = tl.load(windows + layer).to(tl.int32)
    begin = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    return length, begin, begin // TILE, (length + TILE - 1) // TILE


@triton.jit
def _scores_of_tile(
    queries,
    addresses,
    tables,
    factors,
    scales,
    slopes,
    layers,
    layer,
    query_row,
    table_row,
    kv_head,
    position,
    real,
    length,
    stride_block,
    stride_head,
    stride_position,
    stride_dim,
    HEADS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    ELEMENT: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
):
    """Scores ``[ROWS, tile]`` of a group of query heads; rows beyond the group are padding."""
    member, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    head = kv_head * GROUP + member
    query = tl.load(
        queries + (query_row * HEADS + head[:, None]) * HEAD_DIM + dim[None, :],
        mask=(member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    cache = tl.cast(tl.load(addresses + layer), tl.pointer_type(ELEMENT))
    table = tl.cast(tl.load(tables + layer), tl.pointer_type(tl.int32))
    block = tl.load(table + table_row + position // BLOCK_SIZE, mask=real, other=0).to(tl.int64)
    index = block * stride_block + kv_head * stride_head + (position % BLOCK_SIZE) * stride_position
    keys = tl.load(
        cache + index[None, :] + dim[:, None] * stride_dim, mask=real[None, :] & (dim < HEAD_DIM)[:, None], other=0.0
    )
    scale = tl.load(scales + layer * (HEADS // GROUP) + kv_head)
    scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee") * scale
    if SOFTCAP:
        cap = tl.load(factors + layer)
        ratio = scores / tl.where(cap > 0, cap, 1.0)
        # tanh, which is odd: of the absolute value exp() can't overflow.
        decay = tl.exp(-2.0 * tl.abs(ratio))
        bounded = cap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(cap > 0, tl.where(ratio < 0, -bounded, bounded), scores)
    if ALIBI:
        slope = tl.load(slopes + layer * HEADS + head, mask=member < GROUP, other=0.0)
        scores += slope[:, None] * (position - (length - 1)).to(tl.float32)[None, :]
    return scores


@triton.jit(do_not_specialize=["rows"])
def _attend(
    queries,
    addresses,
    tables,
    table_stride,
    requests,
    lengths,
    wanted,
    factors,
    scales,
    slopes,
    layers,
    rows,
    offsets,
    scratch,
    partial,
    stride_block,
    stride_head,
    stride_position,
    stride_dim,
    HEADS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    ELEMENT: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
):
    """Scores of one split, key head and row of a layer, and per query head: maximum, and relative to it the normaliser and
    the sum of score times weight; the sum of absolute scores."""
    pair, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    layer, row = pair // rows, pair % rows
    if tl.load(wanted + row) == 0:
        return
    length, begin, first, last = _extent(lengths, factors + layers, row, layer, TILE)
    share = (last - first + SPLITS - 1) // SPLITS
    member = tl.arange(0, ROWS)
    head = kv_head * GROUP + member
    table_row = tl.load(requests + row) * table_stride
    offset = tl.load(offsets + pair)
    width = (last - first) * TILE
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    product = tl.zeros((ROWS,), tl.float32)
    absolute = tl.zeros((ROWS,), tl.float32)
    for tile in tl.range(first + split * share, tl.minimum(last, first + (split + 1) * share)):
        position = tile * TILE + tl.arange(0, TILE)
        # Masked by position and not by value: a stale cache block may hold NaN.
        real = (position >= begin) & (position < length)
        scores = _scores_of_tile(
            queries,
            addresses,
            tables,
            factors,
            scales,
            slopes,
            layers,
            layer,
            pair,
            table_row,
            kv_head,
            position,
            real,
            length,
            stride_block,
            stride_head,
            stride_position,
            stride_dim,
            HEADS,
            GROUP,
            ROWS,
            HEAD_DIM,
            DIMS,
            BLOCK_SIZE,
            ELEMENT,
            SOFTCAP,
            ALIBI,
        )
        if offset >= 0:
            index = offset + head[:, None] * width + (position - first * TILE)[None, :]
            tl.store(scratch + index, scores, mask=(member < GROUP)[:, None] & real[None, :])
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
    pointer = partial + ((pair * HEADS + head) * SPLITS + split) * 4
    inside = member < GROUP
    tl.store(pointer, maximum, mask=inside)
    tl.store(pointer + 1, total, mask=inside)
    tl.store(pointer + 2, product, mask=inside)
    tl.store(pointer + 3, absolute, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _merge_splits(
    partial,
    lengths,
    wanted,
    factors,
    sinks,
    layers,
    rows,
    padded,
    heads_found,
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    SINKS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
):
    """Per query head: log-normaliser, entropy and sum of absolute scores."""
    pair = tl.program_id(0).to(tl.int64)
    layer, row = pair // rows, pair % rows
    if tl.load(wanted + row) == 0:
        return
    length, begin, _first, _last = _extent(lengths, factors + layers, row, layer, TILE)
    empty = tl.maximum(padded - (length - begin), 0).to(tl.float32)
    head, split = tl.arange(0, HEADS_2), tl.arange(0, SPLITS)
    inside = head < HEADS
    pointer = partial + ((pair * HEADS + head[:, None]) * SPLITS + split[None, :]) * 4
    maxima = tl.load(pointer, mask=inside[:, None], other=0.0)
    totals = tl.load(pointer + 1, mask=inside[:, None], other=1.0)
    products = tl.load(pointer + 2, mask=inside[:, None], other=0.0)
    absolute = tl.load(pointer + 3, mask=inside[:, None], other=0.0)
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
    pointer = heads_found + pair * 3 * HEADS + head
    tl.store(pointer, maximum + tl.log(normaliser), mask=inside)
    tl.store(pointer + HEADS, entropy / _LN2, mask=inside)
    tl.store(pointer + 2 * HEADS, tl.sum(absolute, axis=1), mask=inside)


@triton.jit(do_not_specialize=["rows", "sums_width"])
def _deviate(
    queries,
    addresses,
    tables,
    table_stride,
    requests,
    lengths,
    wanted,
    factors,
    scales,
    slopes,
    layers,
    rows,
    offsets,
    scratch,
    heads_found,
    sums,
    sums_width,
    starts,
    deviations,
    stride_block,
    stride_head,
    stride_position,
    stride_dim,
    HEADS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    ELEMENT: tl.constexpr,  # noqa: N803
    SOFTCAP: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
):
    """Summed deviation of all heads' weights from their mean, over one split.

    With RANKS 0 this rank has all heads. With more, ``sums [ranks, layers, sums_width]`` has the sums over each rank's heads,
    this one's among them; a row's begin at its ``starts``. With RANKS -1 this rank's sums are written there, nothing else is.
    """
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    layer, row = pair // rows, pair % rows
    if tl.load(wanted + row) == 0:
        return
    length, begin, first, last = _extent(lengths, factors + layers, row, layer, TILE)
    share = (last - first + SPLITS - 1) // SPLITS
    KV_HEADS: tl.constexpr = HEADS // GROUP  # noqa: N806
    ALL_HEADS: tl.constexpr = HEADS * RANKS if RANKS > 0 else HEADS  # noqa: N806
    member = tl.arange(0, ROWS)
    table_row = tl.load(requests + row) * table_stride
    offset = tl.load(offsets + pair)
    width = (last - first) * TILE
    deviation = tl.full((), 0.0, tl.float32)
    for tile in tl.range(first + split * share, tl.minimum(last, first + (split + 1) * share)):
        position = tile * TILE + tl.arange(0, TILE)
        real = (position >= begin) & (position < length)
        slot = position - first * TILE
        shared = tl.load(starts + row) + position - begin
        # No more than there is room for, however wrong the host's bound might be.
        fits = real & (shared < sums_width - rows)
        total = tl.zeros((TILE,), tl.float32)
        if RANKS > 0:
            for rank in tl.static_range(RANKS):  # in their order, so that all ranks get the same bits
                total += tl.load(sums + (rank * layers + layer) * sums_width + shared, mask=fits, other=0.0)
        # Twice over the key heads: for the mean, and for the deviation from it.
        for step in tl.range(KV_HEADS if RANKS > 0 else 0, KV_HEADS if RANKS < 0 else 2 * KV_HEADS):
            kv_head = step % KV_HEADS
            head = kv_head * GROUP + member
            inside = (member < GROUP)[:, None] & real[None, :]
            if offset >= 0:
                index = offset + head[:, None] * width + slot[None, :]
                scores = tl.load(scratch + index, mask=inside, other=0.0)
            else:
                scores = _scores_of_tile(
                    queries,
                    addresses,
                    tables,
                    factors,
                    scales,
                    slopes,
                    layers,
                    layer,
                    pair,
                    table_row,
                    kv_head,
                    position,
                    real,
                    length,
                    stride_block,
                    stride_head,
                    stride_position,
                    stride_dim,
                    HEADS,
                    GROUP,
                    ROWS,
                    HEAD_DIM,
                    DIMS,
                    BLOCK_SIZE,
                    ELEMENT,
                    SOFTCAP,
                    ALIBI,
                )
            normaliser = tl.load(heads_found + pair * 3 * HEADS + head, mask=member < GROUP, other=0.0)
            weight = tl.where(inside, tl.exp(scores - normaliser[:, None]), 0.0)
            if step < KV_HEADS:
                total += tl.sum(weight, axis=0)
            else:
                apart = tl.where(inside, tl.abs(weight - (total / ALL_HEADS)[None, :]), 0.0)
                deviation += tl.sum(tl.sum(apart, axis=1), axis=0)
        if RANKS < 0:
            tl.store(sums + layer * sums_width + shared, total, mask=fits)
    if RANKS >= 0:
        tl.store(deviations + pair * SPLITS + split, deviation)


@triton.jit(do_not_specialize=["rows"])
def _finish(
    lengths,
    wanted,
    factors,
    layers,
    rows,
    padded,
    heads_found,
    deviations,
    results,
    RULE: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    HEADS_2: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
):
    """The four statistics of a row and layer."""
    pair = tl.program_id(0).to(tl.int64)
    layer, row = pair // rows, pair % rows
    pairs = layers * rows
    if tl.load(wanted + row) == 0:
        for metric in tl.static_range(4):
            tl.store(results + metric * pairs + pair, float("nan"))
        return
    length, begin, _first, _last = _extent(lengths, factors + layers, row, layer, TILE)
    attended = length - begin
    empty = tl.maximum(padded - attended, 0)
    head = tl.arange(0, HEADS_2)
    inside = head < HEADS
    pointer = heads_found + pair * 3 * HEADS + head
    normaliser = tl.load(pointer, mask=inside, other=0.0)
    entropy = tl.load(pointer + HEADS, mask=inside, other=0.0)
    absolute = tl.load(pointer + 2 * HEADS, mask=inside, other=0.0)
    deviation = tl.sum(tl.load(deviations + pair * SPLITS + tl.arange(0, SPLITS)), axis=0)
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


def attention_statistics(layers: PagedLayers, rows: PagedRows, padded: int, variance_rule: int) -> Tensor:
    """Entropy, varentropy over heads, agreement and interaction, float32 ``[4, layers, rows]``; NaN for rows not wanted.

    Args:
        layers: where the keys are, and how they become scores.
        rows: what is measured.
        padded: slots that count at least, with score 0 (D2); 0 for none.
        variance_rule: 0 over heads, 1 with Bessel's correction, 2 zero.
    """
    number, many = rows.queries.shape[:2]
    results = torch.empty(4, number, many, dtype=torch.float32, device=rows.queries.device)
    if not results.numel():
        return results
    together = _together(layers, rows)
    for start in range(0, number, together):
        chunk = slice(start, start + together)
        launches = _Launches(layers.part(chunk), rows.part(chunk), padded)
        launches.attend()
        launches.deviate()
        results[:, chunk] = launches.finish(variance_rule)
    return results


def head_shares(layers: PagedLayers, rows: PagedRows, padded: int, attended: Tensor, total: int, ranks: RankGroup) -> Tensor:
    """A rank's share of the statistics, as ``attention.ranks.combine_shares`` takes it: float32 ``[layers, rows, heads + 2]``.

    Exchanges the sums of weights once, or more often if memory doesn't allow that. Rows that aren't wanted get anything.

    Args:
        layers: of this rank; ``queries`` and caches have its heads alone.
        rows: what is measured.
        padded: slots that count at least, with score 0 (D2); 0 for none.
        attended: int64 ``[rows]``, positions that a wanted row attends to in each of the layers, 0 for the others.
        total: their sum or more; the host has to know it.
        ranks: that have the other heads.
    """
    number, many, heads, _ = rows.queries.shape
    shares = torch.empty(number, many, heads + 2, dtype=torch.float32, device=rows.queries.device)
    if not shares.numel():
        return shares
    starts = attended.cumsum(0) - attended
    together = layers_together(number, many, heads, total, ranks.size)
    for first in range(0, number, together):
        chunk = slice(first, first + together)
        launches = _Launches(layers.part(chunk), rows.part(chunk), padded)
        launches.attend()
        sums = launches.sums(total, starts)
        everything = ranks.all_gather(sums.flatten()).view(ranks.size, *sums.shape)
        shares[chunk] = launches.shares(everything, starts)
    return shares


def layers_together(layers: int, rows: int, heads: int, total: int, ranks: int) -> int:
    """Layers of one exchange of sums: all, unless memory for what is received or for scores doesn't allow that.

    Args:
        layers: of a step.
        rows: of a step.
        heads: of this rank.
        total: positions that the rows attend to.
        ranks: how many.
    """
    fit = min(_EXCHANGE // (ranks * (total + rows)), _SCRATCH // (heads * (total + rows * TILE)))
    return max(1, min(layers, fit))


def _together(layers: PagedLayers, rows: PagedRows) -> int:
    """Layers whose scores fit the scratch, in a typical context."""
    number, many, heads, _ = rows.queries.shape
    context = min(rows.table_width * layers.caches[0].shape[2], _TYPICAL_CONTEXT)
    return max(1, min(number, _SCRATCH // max(1, many * heads * context)))


class _Launches:
    """The launches for some layers and rows, in their order, and what they share."""

    def __init__(self, layers: PagedLayers, rows: PagedRows, padded: int) -> None:
        number, many, heads, head_dim = rows.queries.shape
        cache, device, pairs = layers.caches[0], rows.queries.device, number * many
        kv_heads = cache.shape[1]
        windows = layers.factors[1].to(torch.int64).unsqueeze(-1)
        begins = torch.where(windows > 0, (rows.lengths - windows).clamp_min(0), 0)
        widths = ((rows.lengths + TILE - 1) // TILE - begins // TILE) * TILE
        needed = torch.where(rows.wanted, widths * heads, 0).flatten()
        ends = needed.cumsum(0)
        size = min(_SCRATCH, pairs * heads * triton.cdiv(rows.table_width * cache.shape[2], TILE) * TILE)
        offsets = torch.where(ends <= size, ends - needed, -1)

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self._layers, self._rows, self._padded = layers, rows, padded
        self._pairs, self._heads, self._kv_heads = pairs, heads, kv_heads
        self._attended = (rows.lengths - begins).flatten()
        self._partial = floats(pairs, heads, SPLITS, 4)
        self._found, self._deviations = floats(pairs, 3, heads), floats(pairs, SPLITS)
        # Never read where the constants say that there are none.
        slopes = layers.factors if layers.alibi_slopes is None else layers.alibi_slopes
        self._sources = (
            *(rows.queries, layers.addresses, rows.tables, rows.table_width, rows.requests, rows.lengths, rows.wanted),
            *(layers.factors, layers.scales, slopes, number, many, offsets, floats(size)),
        )
        group = heads // kv_heads
        self._shape = {
            "HEADS": heads,
            "GROUP": group,
            # The least that a matrix product takes.
            "ROWS": max(16, triton.next_power_of_2(group)),
            "HEAD_DIM": head_dim,
            "DIMS": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_SIZE": cache.shape[2],
            "ELEMENT": _TYPES[cache.dtype],
            "SOFTCAP": layers.capped,
            "ALIBI": layers.alibi_slopes is not None,
            "TILE": TILE,
            "SPLITS": SPLITS,
        }

    def attend(self) -> None:
        """Scores, and what each head says by itself."""
        strides = self._layers.caches[0].stride()
        _attend[(self._pairs, self._kv_heads, SPLITS)](*self._sources, self._partial, *strides, **self._shape)
        sinks = self._layers.sinks
        _merge_splits[(self._pairs,)](
            self._partial,
            self._rows.lengths,
            self._rows.wanted,
            self._layers.factors,
            self._layers.factors if sinks is None else sinks,
            len(self._layers.caches),
            len(self._rows.lengths),
            self._padded,
            self._found,
            HEADS=self._heads,
            HEADS_2=triton.next_power_of_2(self._heads),
            SINKS=sinks is not None,
            TILE=TILE,
            SPLITS=SPLITS,
        )

    def deviate(self, sums: Tensor | None = None, starts: Tensor | None = None, ranks: int = 0) -> None:
        """Deviations from the heads' mean; arguments as the kernel says."""
        strides = self._layers.caches[0].stride()
        _deviate[(self._pairs, SPLITS)](
            *self._sources,
            self._found,
            self._deviations if sums is None else sums,
            0 if sums is None else sums.shape[-1],
            self._rows.lengths if starts is None else starts,
            self._deviations,
            *strides,
            **self._shape,
            RANKS=ranks,
        )

    def finish(self, variance_rule: int) -> Tensor:
        """The statistics ``[4, layers, rows]`` of this rank's heads, which are all."""
        number, many = len(self._layers.caches), len(self._rows.lengths)
        results = torch.empty(4, number, many, dtype=torch.float32, device=self._found.device)
        _finish[(self._pairs,)](
            self._rows.lengths,
            self._rows.wanted,
            self._layers.factors,
            number,
            many,
            self._padded,
            self._found,
            self._deviations,
            results,
            RULE=variance_rule,
            HEADS=self._heads,
            HEADS_2=triton.next_power_of_2(self._heads),
            TILE=TILE,
            SPLITS=SPLITS,
        )
        return results

    def sums(self, total: int, starts: Tensor) -> Tensor:
        """Sums over this rank's heads ``[layers, total + rows]``: of the weights at each position, then of padded slots."""
        number, many = len(self._layers.caches), len(self._rows.lengths)
        sums = torch.empty(number, total + many, dtype=torch.float32, device=self._found.device)
        self.deviate(sums, starts, -1)
        sums[:, total:] = self._padding()[1].sum(dim=-1).view(number, many)
        return sums

    def shares(self, sums: Tensor, starts: Tensor) -> Tensor:
        """This rank's shares ``[layers, rows, heads + 2]``, by the sums of all, ``[ranks, layers, total + rows]``."""
        ranks, many = len(sums), len(self._rows.lengths)
        self.deviate(sums, starts, ranks)
        empty, padding = self._padding()
        mean = sums[:, :, -many:].sum(dim=0).view(-1, 1) / (self._heads * ranks)
        deviation = self._deviations.sum(dim=-1) + empty * (padding - mean).abs().sum(dim=-1)
        absolute = self._found[:, 2].sum(dim=-1)
        means = torch.stack((absolute, deviation), dim=-1) / self._heads
        shares = torch.cat((self._found[:, 1], means), dim=-1)
        return shares.view(-1, many, self._heads + 2)

    def _padding(self) -> tuple[Tensor, Tensor]:
        """Padded slots ``[pairs]``, and the weight that each head gives one of them, ``[pairs, heads]``."""
        empty = (self._padded - self._attended).clamp_min(0)
        return empty, torch.where(empty.unsqueeze(-1) > 0, (-self._found[:, 0]).exp(), 0.0)
