"""Reading keys out of an engine's paged cache, whatever order its attention backend keeps them in.

A reader gives the keys of cache blocks as float32 ``[rows, blocks, kv_heads, head_dim, block_size]``: positions last, so that
one matrix product with the queries gives scores in reading order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.kernels.numba_ import AMX_BFLOAT16, VECTOR_BFLOAT16, VECTOR_FLOAT32

_AMX_ROWS = 16


class UnsupportedAttentionError(Exception):
    """A layer whose attention can't be observed; the message says why."""


@dataclass(frozen=True)
class RawKeys:
    """A cache as a CPU kernel reads it.

    Attributes:
        array: ``[blocks, kv_heads, elements]``, float32, or bfloat16 as uint16; shares the cache's memory.
        layout: one of ``kernels.numba_.attention``'s layouts.
    """

    array: np.ndarray
    layout: int


class KeyReader(Protocol):
    """Reads one layer's keys."""

    @property
    def raw(self) -> RawKeys | None:
        """The cache for a CPU kernel; None if no kernel reads it."""
        ...

    @property
    def block_size(self) -> int:
        """Positions per block."""
        ...

    def read(self, blocks: Tensor) -> Tensor:
        """Keys of ``blocks [rows, blocks]`` (block numbers), float32 ``[rows, blocks, kv_heads, head_dim, block_size]``."""
        ...


@dataclass(frozen=True)
class PlainKeys:
    """Keys kept position by position in a strided cache ``[blocks, kv_heads, block_size, head_dim + value_dim]``."""

    cache: Tensor
    head_dim: int
    scale: Tensor | None = None  # of an fp8 cache: one number, or one per key head
    raw: RawKeys | None = None

    @property
    def block_size(self) -> int:
        """Positions per block."""
        return self.cache.shape[2]

    def read(self, blocks: Tensor) -> Tensor:
        """Keys of ``blocks [rows, blocks]``, float32 ``[rows, blocks, kv_heads, head_dim, block_size]``."""
        keys = self.cache[blocks.long()][..., : self.head_dim].transpose(-1, -2).to(torch.float32)
        return keys if self.scale is None else keys * self.scale.view(-1, 1, 1)


@dataclass(frozen=True)
class CpuVectorKeys:
    """vLLM's CPU cache for the instruction sets ``vec`` and ``vec16``: per block and head transposed keys, then values."""

    cache: Tensor  # [blocks, kv_heads, block_size, 2 * head_dim]

    @cached_property
    def raw(self) -> RawKeys | None:
        """The cache for a CPU kernel."""
        if self.cache.dtype == torch.float32:
            return RawKeys(self.cache.flatten(2).numpy(), VECTOR_FLOAT32)
        if self.cache.dtype == torch.bfloat16:
            return RawKeys(_bits(self.cache), VECTOR_BFLOAT16)
        return None

    @property
    def block_size(self) -> int:
        """Positions per block."""
        return self.cache.shape[2]

    def read(self, blocks: Tensor) -> Tensor:
        """Keys of ``blocks [rows, blocks]``, float32 ``[rows, blocks, kv_heads, head_dim, block_size]``."""
        number, heads, size, double = self.cache.shape
        keys = self.cache.view(number, heads, 2, double // 2, size)[:, :, 0]
        return keys[blocks.long()].to(torch.float32)


@dataclass(frozen=True)
class CpuAmxKeys:
    """vLLM's CPU cache for ``amx``: keys in tiles ``[block_size / 16, head_dim / 2, 16, 2]``, then all values."""

    cache: Tensor  # [blocks, kv_heads, block_size, 2 * head_dim]

    @cached_property
    def raw(self) -> RawKeys | None:
        """The cache for a CPU kernel."""
        return RawKeys(_bits(self.cache), AMX_BFLOAT16)

    @property
    def block_size(self) -> int:
        """Positions per block."""
        return self.cache.shape[2]

    def read(self, blocks: Tensor) -> Tensor:
        """Keys of ``blocks [rows, blocks]``, float32 ``[rows, blocks, kv_heads, head_dim, block_size]``."""
        number, heads, size, double = self.cache.shape
        head_dim = double // 2
        tiles = self.cache.view(number, heads, 2, size * head_dim)[:, :, 0][blocks.long()]
        tiles = tiles.view(*blocks.shape, heads, size // _AMX_ROWS, head_dim // 2, _AMX_ROWS, 2)
        # [..., tile, pair, position, half] → [..., pair, half, tile, position]
        return tiles.permute(0, 1, 2, 4, 6, 3, 5).reshape(*blocks.shape, heads, head_dim, size).to(torch.float32)


def _bits(cache: Tensor) -> np.ndarray:
    """A bfloat16 cache as uint16, which numpy knows."""
    return cache.flatten(2).view(torch.int16).numpy().view(np.uint16)
