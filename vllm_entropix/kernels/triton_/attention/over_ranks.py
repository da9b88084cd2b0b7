"""A rank's share of the statistics, where heads are split over tensor-parallel ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_entropix.kernels.ranks import RankGroup
from vllm_entropix.kernels.triton_.attention.deviations import deviate
from vllm_entropix.kernels.triton_.attention.heads import merge
from vllm_entropix.kernels.triton_.attention.launch import Launch
from vllm_entropix.kernels.triton_.attention.paged import PagedLayers, PagedRows
from vllm_entropix.kernels.triton_.attention.scores import attend
from vllm_entropix.kernels.triton_.attention.workspace import Workspace, exchange_size, exchanged_together


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
            launch = Launch(layers.part(chunk), rows.part(chunk, chosen), padded, workspace)
            attend(launch)
            merge(launch)
            shape = (ranks.size, chunk.stop - chunk.start, positions + len(here))
            everything = exchange[: math.prod(shape)].view(shape)
            _sums(launch, everything[ranks.rank], starts)
            ranks.complete(everything.flatten(1))
            shares[chunk, chosen] = _shares(launch, everything, starts)
    return shares


def _sums(launch: Launch, sums: Tensor, starts: Tensor) -> None:
    """Fill ``[layers, total + rows]`` with sums over this rank's heads: of weights by position, then of padded slots."""
    deviate(launch, sums, starts, -1)
    sums[:, -launch.many :] = _padding(launch)[1].sum(dim=-1).view(launch.number, launch.many)


def _shares(launch: Launch, sums: Tensor, starts: Tensor) -> Tensor:
    """This rank's shares ``[layers, rows, heads + 2]``, by the sums of all, ``[ranks, layers, total + rows]``."""
    ranks = len(sums)
    deviate(launch, sums, starts, ranks)
    empty, padding = _padding(launch)
    mean = sums[:, :, -launch.many :].sum(dim=0).view(-1, 1) / (launch.heads * ranks)
    deviation = launch.deviations.sum(dim=-1) + empty * (padding - mean).abs().sum(dim=-1)
    absolute = launch.found[:, 2].sum(dim=-1)
    means = torch.stack((absolute, deviation), dim=-1) / launch.heads
    shares = torch.cat((launch.found[:, 1], means), dim=-1)
    return shares.view(-1, launch.many, launch.heads + 2)


def _padding(launch: Launch) -> tuple[Tensor, Tensor]:
    """Padded slots ``[pairs]``, and the weight that each head gives one of them, ``[pairs, heads]``."""
    windows = launch.layers.factors[1].to(torch.int64).unsqueeze(-1)
    attended = torch.where(windows > 0, launch.rows.lengths.minimum(windows), launch.rows.lengths)
    empty = (launch.padded - attended.flatten()).clamp_min(0)
    return empty, torch.where(empty.unsqueeze(-1) > 0, (-launch.found[:, 0]).exp(), 0.0)
