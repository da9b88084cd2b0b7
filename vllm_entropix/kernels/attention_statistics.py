"""Queries and paged keys → attention statistics of each layer and row: ``attention.statistics.measure_layer``.

Keys are read once, a tile at a time that all query heads of a group share. Their scores go to a scratch of bounded size, from
which the heads' mean weights, and each head's deviation from them, are computed when the normalisers are known. A row that
finds no room in the scratch has its scores computed again; its bits are the same. The context is cut into a fixed number of
splits whose borders depend on the row alone. One launch covers all layers, as far as the scratch goes for a typical context.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
SPLITS = 16
_LN2 = tl.constexpr(0.6931471805599453)
# Of the scratch, in float32 elements: 128 MiB.
_SCRATCH = 1 << 25
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
        factors: float32 ``[4, layers]``: scale on products, of the keys, softcap (0 for none), window (0 for none).
        alibi_slopes: float32 ``[layers, heads]`` or None.
        sinks: float32 ``[layers, heads]`` or None.
        capped: is there a softcap?
    """

    caches: tuple[Tensor, ...]
    addresses: Tensor
    factors: Tensor
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    capped: bool = False


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
    place = block * stride_block + kv_head * stride_head + (position % BLOCK_SIZE) * stride_position
    keys = tl.load(
        cache + place[None, :] + dim[:, None] * stride_dim, mask=real[None, :] & (dim < HEAD_DIM)[:, None], other=0.0
    )
    scale = tl.load(factors + layer) * tl.load(factors + layers + layer)
    scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee") * scale
    if SOFTCAP:
        cap = tl.load(factors + 2 * layers + layer)
        ratio = scores / tl.where(cap > 0, cap, 1.0)
        # tanh, which is odd: of the absolute value exp() can't overflow.
        decay = tl.exp(-2.0 * tl.abs(ratio))
        bounded = cap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(cap > 0, tl.where(ratio < 0, -bounded, bounded), scores)
    if ALIBI:
        slope = tl.load(slopes + layer * HEADS + head, mask=member < GROUP, other=0.0)
        scores += slope[:, None] * (position - (length - 1)).to(tl.float32)[None, :]
    return scores


@triton.jit
def _attend(
    queries,
    addresses,
    tables,
    table_stride,
    requests,
    lengths,
    wanted,
    factors,
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
    length, begin, first, last = _extent(lengths, factors + 3 * layers, row, layer, TILE)
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
            place = offset + head[:, None] * width + (position - first * TILE)[None, :]
            tl.store(scratch + place, scores, mask=(member < GROUP)[:, None] & real[None, :])
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
    place = partial + ((pair * HEADS + head) * SPLITS + split) * 4
    inside = member < GROUP
    tl.store(place, maximum, mask=inside)
    tl.store(place + 1, total, mask=inside)
    tl.store(place + 2, product, mask=inside)
    tl.store(place + 3, absolute, mask=inside)


@triton.jit
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
    length, begin, _first, _last = _extent(lengths, factors + 3 * layers, row, layer, TILE)
    empty = tl.maximum(padded - (length - begin), 0).to(tl.float32)
    head, split = tl.arange(0, HEADS_2), tl.arange(0, SPLITS)
    inside = head < HEADS
    place = partial + ((pair * HEADS + head[:, None]) * SPLITS + split[None, :]) * 4
    maxima = tl.load(place, mask=inside[:, None], other=0.0)
    totals = tl.load(place + 1, mask=inside[:, None], other=1.0)
    products = tl.load(place + 2, mask=inside[:, None], other=0.0)
    absolute = tl.load(place + 3, mask=inside[:, None], other=0.0)
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
    place = heads_found + pair * 3 * HEADS + head
    tl.store(place, maximum + tl.log(normaliser), mask=inside)
    tl.store(place + HEADS, entropy / _LN2, mask=inside)
    tl.store(place + 2 * HEADS, tl.sum(absolute, axis=1), mask=inside)


@triton.jit
def _deviate(
    queries,
    addresses,
    tables,
    table_stride,
    requests,
    lengths,
    wanted,
    factors,
    slopes,
    layers,
    rows,
    offsets,
    scratch,
    heads_found,
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
):
    """Summed deviation of all heads' weights from their mean, over one split."""
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    layer, row = pair // rows, pair % rows
    if tl.load(wanted + row) == 0:
        return
    length, begin, first, last = _extent(lengths, factors + 3 * layers, row, layer, TILE)
    share = (last - first + SPLITS - 1) // SPLITS
    member = tl.arange(0, ROWS)
    table_row = tl.load(requests + row) * table_stride
    offset = tl.load(offsets + pair)
    width = (last - first) * TILE
    deviation = tl.full((), 0.0, tl.float32)
    for tile in tl.range(first + split * share, tl.minimum(last, first + (split + 1) * share)):
        position = tile * TILE + tl.arange(0, TILE)
        real = (position >= begin) & (position < length)
        mean = tl.zeros((TILE,), tl.float32)
        # Twice over the key heads: for the mean, and for the deviation from it.
        for step in tl.range(2 * (HEADS // GROUP)):
            kv_head = step % (HEADS // GROUP)
            head = kv_head * GROUP + member
            inside = (member < GROUP)[:, None] & real[None, :]
            if offset >= 0:
                place = offset + head[:, None] * width + (position - first * TILE)[None, :]
                scores = tl.load(scratch + place, mask=inside, other=0.0)
            else:
                scores = _scores_of_tile(
                    queries,
                    addresses,
                    tables,
                    factors,
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
            if step < HEADS // GROUP:
                mean += tl.sum(weight, axis=0) / HEADS
            else:
                apart = tl.where(inside, tl.abs(weight - mean[None, :]), 0.0)
                deviation += tl.sum(tl.sum(apart, axis=1), axis=0)
    tl.store(deviations + pair * SPLITS + split, deviation)


@triton.jit
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
    length, begin, _first, _last = _extent(lengths, factors + 3 * layers, row, layer, TILE)
    attended = length - begin
    empty = tl.maximum(padded - attended, 0)
    head = tl.arange(0, HEADS_2)
    inside = head < HEADS
    place = heads_found + pair * 3 * HEADS + head
    normaliser = tl.load(place, mask=inside, other=0.0)
    entropy = tl.load(place + HEADS, mask=inside, other=0.0)
    absolute = tl.load(place + 2 * HEADS, mask=inside, other=0.0)
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


def attention_statistics(
    layers: PagedLayers,
    queries: Tensor,
    tables: Tensor,
    table_width: int,
    requests: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    padded: int,
    variance_rule: int,
) -> Tensor:
    """Entropy, varentropy over heads, agreement and interaction, float32 ``[4, layers, rows]``; NaN for rows not wanted.

    Args:
        layers: where the keys are, and how they become scores.
        queries: ``[layers, rows, heads, head_dim]``, contiguous.
        tables: int64 ``[layers]``, on the device: addresses of the layers' block tables, int32 ``[requests, blocks]``.
        table_width: elements from a request to the next in them.
        requests: int64 ``[rows]``, the rows' requests in the block tables.
        lengths: int64 ``[rows]``, positions up to and including the row's own.
        wanted: bool ``[rows]``; the others cost nothing.
        padded: slots that count at least, with score 0 (D2); 0 for none.
        variance_rule: 0 over heads, 1 with Bessel's correction, 2 zero.
    """
    number, rows, heads, _ = queries.shape
    results = torch.empty(4, number, rows, dtype=torch.float32, device=queries.device)
    if not results.numel():
        return results
    context = min(table_width * layers.caches[0].shape[2], _TYPICAL_CONTEXT)
    together = max(1, min(number, _SCRATCH // (rows * heads * context)))
    for start in range(0, number, together):
        chunk = slice(start, start + together)
        part = PagedLayers(
            layers.caches[chunk],
            layers.addresses[chunk],
            layers.factors[:, chunk].contiguous(),
            None if layers.alibi_slopes is None else layers.alibi_slopes[chunk],
            None if layers.sinks is None else layers.sinks[chunk],
            layers.capped,
        )
        results[:, chunk] = _measure(
            part, queries[chunk], tables[chunk], table_width, requests, lengths, wanted, padded, variance_rule
        )
    return results


def _measure(
    layers: PagedLayers,
    queries: Tensor,
    tables: Tensor,
    table_width: int,
    requests: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    padded: int,
    variance_rule: int,
) -> Tensor:
    number, rows, heads, head_dim = queries.shape
    cache, device, pairs = layers.caches[0], queries.device, number * rows
    kv_heads = cache.shape[1]
    windows = layers.factors[3].to(torch.int64).unsqueeze(-1)
    begins = torch.where(windows > 0, (lengths - windows).clamp_min(0), 0)
    widths = ((lengths + TILE - 1) // TILE - begins // TILE) * TILE
    needed = torch.where(wanted, widths * heads, 0).flatten()
    ends = needed.cumsum(0)
    size = min(_SCRATCH, pairs * heads * triton.cdiv(table_width * cache.shape[2], TILE) * TILE)
    offsets = torch.where(ends <= size, ends - needed, -1)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    scratch, partial = floats(size), floats(pairs, heads, SPLITS, 4)
    found, deviations, results = floats(pairs, 3, heads), floats(pairs, SPLITS), floats(4, number, rows)
    # Never read where the constants say that there are none.
    slopes = layers.factors if layers.alibi_slopes is None else layers.alibi_slopes
    sinks = layers.factors if layers.sinks is None else layers.sinks
    rows_at = (table_width, requests, lengths, wanted, layers.factors, slopes, number, rows, offsets, scratch)
    group = heads // kv_heads
    shape = {
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
    sources = (queries, layers.addresses, tables)
    _attend[(pairs, kv_heads, SPLITS)](*sources, *rows_at, partial, *cache.stride(), **shape)
    heads_2 = triton.next_power_of_2(heads)
    _merge_splits[(pairs,)](
        partial,
        lengths,
        wanted,
        layers.factors,
        sinks,
        number,
        rows,
        padded,
        found,
        HEADS=heads,
        HEADS_2=heads_2,
        SINKS=layers.sinks is not None,
        TILE=TILE,
        SPLITS=SPLITS,
    )
    _deviate[(pairs, SPLITS)](*sources, *rows_at, found, deviations, *cache.stride(), **shape)
    _finish[(pairs,)](
        lengths,
        wanted,
        layers.factors,
        number,
        rows,
        padded,
        found,
        deviations,
        results,
        RULE=variance_rule,
        HEADS=heads,
        HEADS_2=heads_2,
        TILE=TILE,
        SPLITS=SPLITS,
    )
    return results
