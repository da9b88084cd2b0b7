"""One layer of attention as its statistics need it: how queries and paged keys become scores, and a step's rows in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_entropix.attention.paged_keys import KeyReader


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
        query_scale: what fp8 queries were divided by, one number or one per key head; None for other queries.
    """

    keys: KeyReader
    scale: float
    softcap: float = 0.0
    window: int | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    query_scale: Tensor | None = None

    def scores(self, queries: Tensor, block_table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores before the softmax and the index of each row's first real position among them.

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
        if self.query_scale is not None:
            grouped = grouped * self.query_scale.view(-1, 1, 1)
        scores = torch.matmul(grouped, keys)  # [rows, blocks, kv_heads, groups, block_size]
        scores = scores.permute(0, 2, 3, 1, 4).reshape(rows, heads, width * size) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        offset = first_blocks * size
        if self.alibi_slopes is not None:
            index = offset.unsqueeze(-1) + torch.arange(width * size, device=lengths.device)
            distance = (index - (lengths - 1).unsqueeze(-1)).unsqueeze(1)
            scores = scores + self.alibi_slopes.view(1, -1, 1) * distance
        return scores, starts - offset


@dataclass(frozen=True)
class LayerRows:
    """One layer's part in a step.

    Attributes:
        layer: how it attends.
        queries: ``[rows, heads, head_dim]``, or all that were kept of the layer, in which the step's rows have to be found.
        block_table: of all requests, ``[requests, blocks]``, block numbers from the sequence's beginning.
    """

    layer: LayerAttention
    queries: Tensor
    block_table: Tensor
