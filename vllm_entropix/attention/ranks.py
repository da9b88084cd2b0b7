"""Statistics over the heads of all tensor-parallel ranks: exact, the same bits on every rank, by two exchanges a step.

Agreement is a deviation from the mean over all heads, so the sums of each rank's weights are exchanged first: as many numbers
a layer and row as the context is long. Then one small exchange brings what each rank's heads say, of all layers and rows
together. Every rank adds the same numbers in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_entropix.attention.launches import ROWS_IN_ORDER, Kept, launches
from vllm_entropix.attention.layers import LayerRows
from vllm_entropix.attention.statistics import head_statistics
from vllm_entropix.distribution.attention import AttentionStatistics, HeadStatistics
from vllm_entropix.kernels.ranks import RankGroup

if TYPE_CHECKING:
    from vllm_entropix.settings.server import AttentionRules

# Weights that the PyTorch path keeps for an exchange, in float32 elements: 128 MiB.
_MAX_WEIGHTS = 1 << 25
# From so many numbers on it is worth asking the device how many there are without the rows that aren't wanted: 16 MiB.
WORTH_WAITING = 1 << 22


def combine_shares(
    shares: Sequence[Tensor], counted: Sequence[Tensor], ranks: RankGroup, config: AttentionRules
) -> AttentionStatistics:
    """The statistics of all layers, ``[layers, rows]`` each, from what each rank's heads say, by one exchange.

    Args:
        shares: this rank's of each layer, float32 ``[rows, heads + 2]``: per head its entropy, then the means over these heads
            of the summed absolute scores and of the summed deviation.
        counted: of each layer, ``[rows]``: number of slots that means are taken over.
        ranks: that have the other heads.
        config: how statistics are taken.
    """
    flat = torch.cat([share.flatten() for share in shares])
    if not len(flat):  # nothing to exchange, on all ranks alike
        return AttentionStatistics(*(flat.new_empty(len(shares), 0) for _ in range(4)))
    everything = torch.split(ranks.all_gather(flat), [share.numel() for share in shares], dim=1)
    layers = []
    for share, of_ranks, slots in zip(shares, everything, counted, strict=True):
        rows, width = share.shape
        by_row = of_ranks.view(ranks.size, rows, width).transpose(0, 1)  # [rows, ranks, heads + 2]
        entropy, score_sum, deviation = by_row[:, :, :-2].flatten(1), by_row[:, :, -2], by_row[:, :, -1]
        layers.append(AttentionStatistics.from_heads(entropy, score_sum, deviation, slots, config.attention_varentropy))
    return AttentionStatistics.stacked(layers)


def measure_over_ranks(
    layers: Sequence[LayerRows], requests: Tensor, lengths: Tensor, config: AttentionRules, ranks: RankGroup
) -> AttentionStatistics:
    """Statistics of several layers in PyTorch, ``[layers, rows]`` each.

    Args:
        layers: of any kind, with this rank's heads.
        requests: int64 ``[rows]``, the rows' requests in the block tables.
        lengths: int64 ``[rows]``, positions up to and including the row's own.
        config: how statistics are taken.
        ranks: that have the other heads.
    """
    parts = (
        (index, rows, heads)
        for index, one in enumerate(layers)
        for rows, heads in head_statistics(one.layer, one.queries, one.block_table[requests], lengths, config)
    )
    found = [lengths.new_empty(len(lengths), one.queries.shape[1] + 2, dtype=torch.float32) for one in layers]
    counted = [torch.empty_like(lengths) for _ in layers]
    waiting: list[tuple[int, Tensor, HeadStatistics]] = []
    held = 0

    def exchange() -> None:
        shares = shares_of_heads([heads for _, _, heads in waiting], ranks)
        for (index, rows, heads), share in zip(waiting, shares, strict=True):
            found[index][rows], counted[index][rows] = share, heads.counted

    for part in parts:
        # All ranks have as many heads, and so exchange at the same places.
        size = part[2].weights.numel()
        if waiting and held + size > _MAX_WEIGHTS:
            exchange()
            waiting, held = [], 0
        waiting.append(part)
        held += size
    if waiting:
        exchange()
    return combine_shares(found, counted, ranks, config)


def shares_of_heads(parts: Sequence[HeadStatistics], ranks: RankGroup) -> list[Tensor]:
    """This rank's shares, as :func:`combine_shares` takes them, by one exchange of the sums of weights."""
    sums = [torch.cat((part.weights.sum(dim=1), part.empty_weight.sum(dim=1, keepdim=True)), dim=-1) for part in parts]
    everything = torch.split(ranks.all_gather(torch.cat([one.flatten() for one in sums])), [one.numel() for one in sums], dim=1)
    shares = []
    for part, one, of_ranks in zip(parts, sums, everything, strict=True):
        mean = of_ranks.sum(dim=0).view_as(one) / (part.entropy.shape[1] * ranks.size)
        deviation = part.deviation_from(mean[:, :-1], mean[:, -1])
        means = torch.stack((part.score_sum.mean(dim=1), deviation.mean(dim=1)), dim=-1)
        shares.append(torch.cat((part.entropy, means), dim=-1))
    return shares


def measure_over_ranks_by_triton(
    layers: Sequence[LayerRows],
    requests: Tensor,
    lengths: Tensor,
    wanted: Tensor,
    bounds: Tensor,
    config: AttentionRules,
    ranks: RankGroup,
    kept: Kept = ROWS_IN_ORDER,
) -> AttentionStatistics:
    """The same by the kernels, for layers with plain keys; the device is not waited for unless that saves more than it costs.

    Args:
        layers: with plain keys, and this rank's heads.
        requests: int64 ``[rows]``.
        lengths: int64 ``[rows]``.
        wanted: bool ``[rows]``; the others get NaN.
        bounds: integers ``[at least rows]`` on the host, whose sum is no less than that of any window's share of the lengths.
        config: how statistics are taken.
        ranks: that have the other heads.
        kept: where the rows' queries are, and what they are measured with.
    """
    from vllm_entropix.kernels.triton_.attention.over_ranks import head_shares

    padded = config.padded_positions or 0
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for indices, paged, rows in launches(layers, requests, lengths, wanted, kept, by_window=True):
        window = layers[indices[0]].layer.window
        attended = torch.where(wanted, lengths if window is None else lengths.clamp_max(window), 0)
        total = int((bounds if window is None else bounds.clamp_max(window)).sum())
        if len(indices) * total > WORTH_WAITING:
            total = int(attended.sum())
        longest = rows.longest if window is None else min(rows.longest, window)
        room = (kept.workspace, kept.exchange)
        shares_of_layers = head_shares(paged, rows, padded, attended, total, longest, ranks, *room)
        for index, share in zip(indices, shares_of_layers, strict=True):
            found[index] = torch.where(wanted.unsqueeze(-1), share, torch.nan), attended.clamp_min(padded)
    shares, counted = zip(*(found[index] for index in range(len(layers))), strict=True)
    return combine_shares(shares, counted, ranks, config)
