"""Queries and paged keys → attention statistics of each row (the PyTorch twin of the kernel)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_entropix.attention.launches import measure_layers, measured_by_triton
from vllm_entropix.attention.layers import LayerAttention, LayerRows
from vllm_entropix.attention.paged_keys import RawKeys
from vllm_entropix.distribution.attention import AttentionStatistics, HeadStatistics
from vllm_entropix.kernels.backend import kernels_for
from vllm_entropix.kernels.rules import VARIANCE_RULES

if TYPE_CHECKING:
    from vllm_entropix.settings.server import AttentionRules

# Keys of a layer that are unpacked at a time, in elements: bounds the extra memory at 4 times this many bytes.
_MAX_KEY_ELEMENTS = 1 << 23


def measure_layer(
    layer: LayerAttention,
    queries: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    config: AttentionRules,
) -> AttentionStatistics:
    """Statistics of one layer for ``queries [rows, heads, head_dim]``; the other arguments as of ``LayerAttention.scores``.

    By the kernel for this device where there is one for such a layer, otherwise in PyTorch.
    """
    if measured_by_triton([layer], queries.device):
        requests, wanted = torch.arange(len(lengths), device=lengths.device), torch.ones_like(lengths, dtype=torch.bool)
        return measure_layers([LayerRows(layer, queries, block_table)], requests, lengths, wanted, config).mean_over_layers()
    plain = not layer.softcap and layer.alibi_slopes is None and layer.sinks is None
    if plain and kernels_for(queries.device) == "numba" and layer.keys.raw is not None:
        return _measure_by_cpu_kernel(layer, layer.keys.raw, queries, block_table, lengths, config)
    return measure_layer_in_pytorch(layer, queries, block_table, lengths, config)


def _measure_by_cpu_kernel(
    layer: LayerAttention, raw: RawKeys, queries: Tensor, block_table: Tensor, lengths: Tensor, config: AttentionRules
) -> AttentionStatistics:
    from vllm_entropix.kernels.numba_.attention import measure_rows
    from vllm_entropix.kernels.numba_.threads import share_rows

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
        VARIANCE_RULES[config.attention_varentropy],
        results.numpy(),
    )
    # Some 16 multiplications take a nanosecond.
    share_rows(host_lengths * (heads * head_dim) // 16, lambda first, last: measure_rows(*arguments, first, last))
    return AttentionStatistics(*results)


def measure_layer_in_pytorch(
    layer: LayerAttention, queries: Tensor, block_table: Tensor, lengths: Tensor, config: AttentionRules
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
    layer: LayerAttention, queries: Tensor, block_table: Tensor, lengths: Tensor, config: AttentionRules
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
