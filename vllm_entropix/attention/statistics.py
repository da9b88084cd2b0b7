"""Queries and paged keys → attention statistics of each row (the PyTorch twin of the kernel)."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vllm_entropix.attention.paged_keys import KeyReader, PlainKeys, RawKeys
from vllm_entropix.kernels import kernels_for
from vllm_entropix.sampling.metrics import AttentionStatistics, HeadStatistics

if TYPE_CHECKING:
    from vllm_entropix.config import EntropixConfig
    from vllm_entropix.kernels.attention_statistics import PagedLayers, PagedRows

# Keys of a layer that are unpacked at a time, in elements: bounds the extra memory at 4 times this many bytes.
_MAX_KEY_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class LayerAttention:
    """How one layer turns queries and keys into scores.

    Attributes:
        keys: reads the layer's keys.
        scale: factor on the products.
        softcap: scores are ``softcap·tanh(score / softcap)``; 0 for none.
        window: positions a query attends to at most, its own included; None for all.
        alibi_slopes: ``[heads]``, bias per position of distance.
        sinks: ``[heads]``, logits that take weight without being a position.
    """

    keys: KeyReader
    scale: float
    softcap: float = 0.0
    window: int | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    def scores(self, queries: Tensor, block_table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores before the softmax and the place of each row's first real position among them.

        Args:
            queries: ``[rows, heads, head_dim]``.
            block_table: ``[rows, blocks]``, block numbers from the sequence's beginning.
            lengths: ``[rows]``, positions up to and including the query's own.

        Returns:
            float32 ``[rows, heads, positions]`` and int64 ``[rows]``.
        """
        size = self.keys.block_size
        starts = torch.zeros_like(lengths) if self.window is None else (lengths - self.window).clamp_min(0)
        first_blocks = starts // size
        width = int(((lengths + size - 1) // size - first_blocks).max())
        # Rows that need fewer blocks read their last one again; what it gives is masked.
        wanted = first_blocks.unsqueeze(-1) + torch.arange(width, device=lengths.device)
        last = (lengths.unsqueeze(-1) - 1) // size
        keys = self.keys.read(block_table.gather(-1, torch.minimum(wanted, last).long()))
        rows, heads, head_dim = queries.shape
        groups = heads // keys.shape[2]
        grouped = queries.to(torch.float32).view(rows, 1, keys.shape[2], groups, head_dim)
        scores = torch.matmul(grouped, keys)  # [rows, blocks, kv_heads, groups, block_size]
        scores = scores.permute(0, 2, 3, 1, 4).reshape(rows, heads, width * size) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        offset = first_blocks * size
        if self.alibi_slopes is not None:
            place = offset.unsqueeze(-1) + torch.arange(width * size, device=lengths.device)
            distance = (place - (lengths - 1).unsqueeze(-1)).unsqueeze(1)
            scores = scores + self.alibi_slopes.view(1, -1, 1) * distance
        return scores, starts - offset


def measure_layer(
    layer: LayerAttention,
    queries: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    config: EntropixConfig,
) -> AttentionStatistics:
    """Statistics of one layer for ``queries [rows, heads, head_dim]``; ``lengths`` and ``block_table`` as in ``scores``.

    By the kernel for this device where there is one for such a layer, otherwise in PyTorch.
    """
    kernels = kernels_for(queries.device)
    if kernels == "triton" and _read_by_triton(layer):
        requests, wanted = torch.arange(len(lengths), device=lengths.device), torch.ones_like(lengths, dtype=torch.bool)
        measured = measure_layers([layer], queries.unsqueeze(0), [block_table], requests, lengths, wanted, config)
        return AttentionStatistics(*(metric[0] for metric in measured))
    plain = not layer.softcap and layer.alibi_slopes is None and layer.sinks is None
    if plain and kernels == "numba" and layer.keys.raw is not None:
        return _measure_by_cpu_kernel(layer, layer.keys.raw, queries, block_table, lengths, config)
    return measure_layer_in_pytorch(layer, queries, block_table, lengths, config)


_VARIANCE_RULES = {"heads": 0, "heads-unbiased": 1, "zero": 2}


def measured_by_triton(layers: Sequence[LayerAttention], device: torch.device) -> bool:
    """Can :func:`measure_layers` measure all of these layers on ``device``?"""
    return kernels_for(device) == "triton" and all(map(_read_by_triton, layers))


def launch_kind(layer: LayerAttention, block_table: Tensor) -> Hashable:
    """Layers of one kind are measured by one launch."""
    cache = layer.keys.cache if isinstance(layer.keys, PlainKeys) else None
    return cache is not None and (cache.dtype, cache.shape[1:], cache.stride(), block_table.stride())


def _read_by_triton(layer: LayerAttention) -> bool:
    from vllm_entropix.kernels.attention_statistics import supports

    return isinstance(layer.keys, PlainKeys) and supports(layer.keys.cache.dtype)


def measure_layers(
    layers: Sequence[LayerAttention],
    queries: Tensor,
    block_tables: Sequence[Tensor],
    requests: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    config: EntropixConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four statistics of several layers by one launch of the Triton kernels, each ``[layers, rows]``.

    Args:
        layers: with plain keys whose caches differ in nothing but their contents.
        queries: ``[layers, rows, heads, head_dim]``.
        block_tables: of each layer, ``[requests, blocks]``; equal strides.
        requests: int64 ``[rows]``, the rows' requests in the block tables.
        lengths: int64 ``[rows]``.
        wanted: bool ``[rows]``; the others get NaN and cost nothing.
        config: how statistics are taken.
    """
    from vllm_entropix.kernels.attention_statistics import attention_statistics

    paged, rows = paged_rows(layers, queries, block_tables, requests, lengths, wanted)
    results = attention_statistics(paged, rows, config.padded_positions or 0, _VARIANCE_RULES[config.attention_varentropy])
    entropy, varentropy, agreement, strength = results
    return entropy, varentropy, agreement, strength


def paged_rows(
    layers: Sequence[LayerAttention],
    queries: Tensor,
    block_tables: Sequence[Tensor],
    requests: Tensor,
    lengths: Tensor,
    wanted: Tensor,
) -> tuple[PagedLayers, PagedRows]:
    """What :func:`measure_layers` is given, as the Triton kernels take it."""
    from vllm_entropix.kernels.attention_statistics import PagedRows

    tables = tuple(table.to(torch.int32) for table in block_tables)
    addresses = _addresses(queries.device, tuple(table.data_ptr() for table in tables))
    stride = tables[0].stride(0)
    rows = PagedRows(queries.contiguous(), addresses, stride, requests, lengths, wanted, tables)
    return _paged_layers(tuple(layers)), rows


@lru_cache(maxsize=256)
def _addresses(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    values = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    # Pinned, so that the copy needn't wait for the device.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


# What the kernels need of layers, by the first of them (and with the others): built once, and forgotten with the first.
_PAGED: WeakKeyDictionary[LayerAttention, tuple[tuple[LayerAttention, ...], PagedLayers]] = WeakKeyDictionary()


def _paged_layers(layers: tuple[LayerAttention, ...]) -> PagedLayers:
    from vllm_entropix.kernels.attention_statistics import PagedLayers

    first, others = layers[0], layers[1:]
    known = _PAGED.get(first)
    if known is not None and len(known[0]) == len(others) and all(map(operator.is_, known[0], others)):
        return known[1]
    keys = [layer.keys for layer in layers if isinstance(layer.keys, PlainKeys)]
    caches = tuple(one.cache for one in keys)
    device, shapes = caches[0].device, {(cache.dtype, cache.shape[1:], cache.stride()) for cache in caches}
    if len(keys) != len(layers) or len(shapes) != 1:
        raise ValueError("the layers' caches differ in type, shape or strides")
    factors = torch.tensor(
        [(layer.scale, 1.0, layer.softcap, float(layer.window or 0)) for layer in layers], dtype=torch.float32
    )
    factors = factors.T.contiguous().to(device)
    for index, one in enumerate(keys):
        if one.scale is not None:
            factors[1, index] = one.scale
    built = PagedLayers(
        caches,
        _addresses(device, tuple(cache.data_ptr() for cache in caches)),
        factors,
        _stacked([layer.alibi_slopes for layer in layers], 0.0, device),
        _stacked([layer.sinks for layer in layers], -torch.inf, device),
        any(layer.softcap for layer in layers),
    )
    _PAGED[first] = (others, built)
    return built


def _stacked(values: Sequence[Tensor | None], missing: float, device: torch.device) -> Tensor | None:
    """Numbers of each layer's heads, float32 ``[layers, heads]``; None if no layer has any."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    filled = (torch.full_like(there[0], missing) if value is None else value for value in values)
    return torch.stack([value.to(device, torch.float32) for value in filled])


def _measure_by_cpu_kernel(
    layer: LayerAttention, raw: RawKeys, queries: Tensor, block_table: Tensor, lengths: Tensor, config: EntropixConfig
) -> AttentionStatistics:
    from vllm_entropix.kernels.cpu.attention import measure_rows
    from vllm_entropix.kernels.cpu.threads import share_rows

    rows, heads, head_dim = queries.shape
    results = torch.empty(4, rows, dtype=torch.float32)
    host_lengths = lengths.numpy()
    arguments = (
        queries.to(torch.float32).numpy(),
        raw.array,
        raw.layout,
        layer.keys.block_size,
        block_table.numpy(),
        host_lengths,
        layer.window or 0,
        layer.scale,
        config.padded_positions or 0,
        _VARIANCE_RULES[config.attention_varentropy],
        results.numpy(),
    )
    share_rows(host_lengths * (heads * head_dim), lambda first, last: measure_rows(*arguments, first, last))
    return AttentionStatistics(*results)


def measure_layer_in_pytorch(
    layer: LayerAttention, queries: Tensor, block_table: Tensor, lengths: Tensor, config: EntropixConfig
) -> AttentionStatistics:
    """The same as :func:`measure_layer`, for every kind of layer."""
    results = AttentionStatistics(*(torch.empty(len(lengths), dtype=torch.float32, device=lengths.device) for _ in range(4)))
    for rows, heads in head_statistics(layer, queries, block_table, lengths, config):
        deviation = heads.deviation_from(heads.weights.mean(dim=1), heads.empty_weight.mean(dim=1))
        statistics = AttentionStatistics.from_heads(
            heads.entropy, heads.score_sum, deviation, heads.counted, config.attention_varentropy
        )
        results.attention_entropy[rows] = statistics.attention_entropy
        results.attention_varentropy[rows] = statistics.attention_varentropy
        results.agreement[rows] = statistics.agreement
        results.interaction_strength[rows] = statistics.interaction_strength
    return results


def head_statistics(
    layer: LayerAttention, queries: Tensor, block_table: Tensor, lengths: Tensor, config: EntropixConfig
) -> Iterator[tuple[Tensor, HeadStatistics]]:
    """One layer's heads, a group of rows at a time, with the rows' indices; arguments as of :func:`measure_layer`."""
    for rows in _groups(lengths, layer):
        scores, starts = layer.scores(queries[rows], block_table[rows], lengths[rows])
        attended = lengths[rows] if layer.window is None else lengths[rows].clamp_max(layer.window)
        yield rows, HeadStatistics.from_scores(scores, attended, config.padded_positions, layer.sinks, starts)


def _groups(lengths: Tensor, layer: LayerAttention) -> Iterator[Tensor]:
    """Rows of similar length, few enough that their keys fit the bound; a row is padded to at most twice its length."""
    size = layer.keys.block_size
    attended = lengths if layer.window is None else lengths.clamp_max(layer.window + size)
    blocks, order = ((attended + size - 1) // size).sort(descending=True)
    per_block = max(1, layer.keys.read(torch.zeros(1, 1, dtype=torch.int64, device=lengths.device)).numel())
    counts = blocks.tolist()
    start = 0
    while start < len(counts):
        most = max(1, _MAX_KEY_ELEMENTS // (per_block * counts[start]))
        stop = start + 1
        while stop < min(len(counts), start + most) and counts[stop] * 2 >= counts[start]:
            stop += 1
        yield order[start:stop]
        start = stop
