"""Layers with plain keys → launches of the Triton kernels: which layers share one, and what it is given."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vllm_entropix.attention.layers import LayerAttention, LayerRows
from vllm_entropix.attention.paged_keys import PlainKeys
from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.kernels.backend import kernels_for
from vllm_entropix.kernels.rules import VARIANCE_RULES

if TYPE_CHECKING:
    from vllm_entropix.kernels.triton_.attention.paged import PagedLayers, PagedRows
    from vllm_entropix.kernels.triton_.attention.workspace import Workspace
    from vllm_entropix.settings.server import AttentionRules


@dataclass(frozen=True)
class Kept:
    """What is known of a step's rows beside the rows themselves.

    Attributes:
        query_rows: int64 ``[rows]``, where a row's queries are among those of each layer; None for one after the other.
        longest: no row's length is greater; None if nothing is known but the block tables' width.
        workspace: for the kernels; None to allocate it.
        exchange: for what ranks exchange; None to allocate it.
    """

    query_rows: Tensor | None = None
    longest: int | None = None
    workspace: Workspace | None = None
    exchange: Tensor | None = None


ROWS_IN_ORDER = Kept()


def measured_by_triton(layers: Sequence[LayerAttention], device: torch.device) -> bool:
    """Can :func:`measure_layers` measure all of these layers on ``device``?"""
    return on_triton(device) and readable(layers)


def on_triton(device: torch.device) -> bool:
    """Are statistics measured by Triton's kernels on this device, of layers that are :func:`readable`?"""
    return kernels_for(device) == "triton"


def readable(layers: Sequence[LayerAttention]) -> bool:
    """Do the kernels read the keys of all of these layers?"""
    from vllm_entropix.kernels.triton_.attention.launch import supports

    return all(isinstance(layer.keys, PlainKeys) and supports(layer.keys.cache.dtype) for layer in layers)


def measure_layers(
    layers: Sequence[LayerRows],
    requests: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    config: AttentionRules,
    kept: Kept = ROWS_IN_ORDER,
) -> AttentionStatistics:
    """Statistics of several layers by the Triton kernels, ``[layers, rows]`` each; the device is never waited for.

    Args:
        layers: with plain keys; those whose caches have one type, shape and strides are measured by one launch.
        requests: int64 ``[rows]``, the rows' requests in the block tables.
        lengths: int64 ``[rows]``, positions up to and including the row's own.
        wanted: bool ``[rows]``; the others get NaN and cost nothing.
        config: how statistics are taken.
        kept: where their queries are, and what they are measured with.
    """
    from vllm_entropix.kernels.triton_.attention.statistics import attention_statistics

    padded, rule = config.padded_positions or 0, VARIANCE_RULES[config.attention_varentropy]
    found: dict[int, Tensor] = {}
    for indices, paged, rows in launches(layers, requests, lengths, wanted, kept):
        results = attention_statistics(paged, rows, padded, rule, kept.workspace)
        if len(indices) == len(layers):
            return AttentionStatistics(*results)
        found.update(zip(indices, results.unbind(dim=1), strict=True))
    return AttentionStatistics(*torch.stack([found[index] for index in range(len(layers))], dim=1))


def launches(
    layers: Sequence[LayerRows], requests: Tensor, lengths: Tensor, wanted: Tensor, kept: Kept, by_window: bool = False
) -> Iterator[tuple[list[int], PagedLayers, PagedRows]]:
    """Layers that one launch can measure: their indices among ``layers``, and what the kernels take.

    Args:
        layers: with plain keys.
        requests: int64 ``[rows]``.
        lengths: int64 ``[rows]``.
        wanted: bool ``[rows]``.
        kept: where their queries are.
        by_window: must the layers of a launch have one window, too?

    Raises:
        ValueError: a layer's keys aren't plain.
    """
    from vllm_entropix.kernels.triton_.attention.paged import PagedRows

    # Layers of one group of the cache share a table.
    tables = {id(one.block_table): one.block_table for one in layers}
    by_kind = _by_kind(layers, {known: table.stride() for known, table in tables.items()}, by_window)
    read = {known: table.to(torch.int32) for known, table in tables.items()}
    addresses = {known: table.data_ptr() for known, table in read.items()}
    query_rows = torch.arange(len(lengths), device=lengths.device) if kept.query_rows is None else kept.query_rows
    for indices, paged, queries, query_addresses in by_kind:
        of_layers = [id(layers[index].block_table) for index in indices]
        table = read[of_layers[0]]
        longest = table.shape[1] * paged.caches[0].shape[2]
        rows = PagedRows(
            queries,
            query_addresses,
            query_rows,
            _addresses(lengths.device, tuple(addresses[known] for known in of_layers)),
            table.stride(0),
            requests,
            lengths,
            longest if kept.longest is None else min(longest, kept.longest),
            wanted,
            tuple(read[known] for known in of_layers),
        )
        yield indices, paged, rows


_Kind = tuple[list[int], "PagedLayers", tuple[Tensor, ...], Tensor]
# How layers were sorted last, by the first of them: with the other layers, all queries, and what else they were sorted by. It
# is forgotten with the first layer.
_SORTED: WeakKeyDictionary[LayerAttention, tuple[list[LayerAttention], list[Tensor], Hashable, list[_Kind]]] = (
    WeakKeyDictionary()
)


def _by_kind(layers: Sequence[LayerRows], strides: Mapping[int, tuple[int, ...]], by_window: bool) -> list[_Kind]:
    """Layers that one launch can measure: indices, what the kernels take of them, queries and their addresses.

    They are sorted once, and again when a layer or its queries are others, or tables have other strides (of each by ``id``).
    """
    first, others, queries = layers[0].layer, [one.layer for one in layers[1:]], [one.queries for one in layers]
    of_tables = [strides[id(one.block_table)] for one in layers]
    same = (tuple(of_tables), by_window)
    known = _SORTED.get(first)
    if known is not None and known[2] == same and _are(known[0], others) and _are(known[1], queries):
        return known[3]
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    for index, (one, stride) in enumerate(zip(layers, of_tables, strict=True)):
        kinds[_kind(one), stride, one.layer.window if by_window else None].append(index)
    found: list[_Kind] = []
    for indices in kinds.values():
        paged = _paged_layers(tuple(layers[index].layer for index in indices))
        read = tuple(_aligned(layers[index].queries.contiguous()) for index in indices)
        found.append((indices, paged, read, _addresses(read[0].device, tuple(one.data_ptr() for one in read))))
    # A copy of queries is of this step alone.
    if all(_are(read, [queries[index] for index in indices]) for indices, _, read, _ in found):
        _SORTED[first] = others, queries, same, found
    return found


def _are(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _kind(one: LayerRows) -> Hashable:
    cache = _plain(one.layer).cache
    return cache.dtype, cache.shape[1:], cache.stride(), one.queries.shape[1:], one.queries.dtype


def _plain(layer: LayerAttention) -> PlainKeys:
    if not isinstance(layer.keys, PlainKeys):
        raise ValueError(f"the kernels read plain keys, not {type(layer.keys).__name__}")
    return layer.keys


def _aligned(values: Tensor) -> Tensor:
    """What the kernels read 16 bytes at a time, where that is possible."""
    return values.clone() if values.data_ptr() % 16 else values


@lru_cache(maxsize=256)
def _addresses(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    values = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    # Pinned, so that the copy needn't wait for the device.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


# What the kernels need of layers, by the first of them (and with the others): built once, and forgotten with the first.
_PAGED: WeakKeyDictionary[LayerAttention, tuple[tuple[LayerAttention, ...], PagedLayers]] = WeakKeyDictionary()


def _paged_layers(layers: tuple[LayerAttention, ...]) -> PagedLayers:
    from vllm_entropix.kernels.triton_.attention.paged import PagedLayers

    first, others = layers[0], layers[1:]
    known = _PAGED.get(first)
    if known is not None and _are(known[0], others):
        return known[1]
    keys = [_plain(layer) for layer in layers]
    caches = tuple(one.cache for one in keys)
    if any(cache.data_ptr() % 16 for cache in caches):
        raise ValueError("the kernels read keys that are aligned to 16 bytes")
    device = caches[0].device
    factors = torch.tensor([(layer.softcap, float(layer.window or 0)) for layer in layers], dtype=torch.float32)
    factors = factors.T.contiguous().to(device)
    scales = torch.stack([_scales(layer, one) for layer, one in zip(layers, keys, strict=True)])
    built = PagedLayers(
        caches,
        _addresses(device, tuple(cache.data_ptr() for cache in caches)),
        factors,
        scales,
        _stacked([layer.alibi_slopes for layer in layers], 0.0, device),
        _stacked([layer.sinks for layer in layers], -torch.inf, device),
        any(layer.softcap for layer in layers),
    )
    _PAGED[first] = (others, built)
    return built


def _scales(layer: LayerAttention, keys: PlainKeys) -> Tensor:
    """What products of queries and keys are multiplied with, float32 ``[kv_heads]``."""
    scales = torch.full((keys.cache.shape[1],), layer.scale, dtype=torch.float32, device=keys.cache.device)
    for scale in (keys.scale, layer.query_scale):
        if scale is not None:
            scales = scales * scale.to(scales.device, torch.float32)
    return scales


def _stacked(values: Sequence[Tensor | None], missing: float, device: torch.device) -> Tensor | None:
    """Numbers of each layer's heads, float32 ``[layers, heads]``; None if no layer has any."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    filled = (torch.full_like(there[0], missing) if value is None else value for value in values)
    return torch.stack([value.to(device, torch.float32) for value in filled])
