"""What the launches for some layers and rows share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.attention.paged import PagedLayers, PagedRows
from vllm_entropix.kernels.triton_.attention.shares import LEAST, SPLITS, TILE, splits_of
from vllm_entropix.kernels.triton_.attention.workspace import Workspace, sizes_of
from vllm_entropix.kernels.triton_.sizes import power_of_2

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}


def supports(dtype: torch.dtype) -> bool:
    """Are keys of this type read?"""
    return dtype in _TYPES


class Launch:
    """Some layers and rows, and what their launches share; ``programs`` that take whole rows, or 0.

    Attributes:
        number: of layers.
        many: rows.
        splits: shares of a context at most.
        room: elements for scores, of a program that takes whole rows, or else of a layer.
        room_for_all: is no row without room?
        offsets: int64, see ``scores._plan``.
        without: int32, how many rows of each layer have no room.
        scratch: the scores.
        partial: what each share says of each head.
        own: room for the tile that a program of ``deviations._deviate_again`` works on.
        found: ``[layers * rows, 3, heads]``, what each head says by itself: log-normaliser, entropy, sum of absolute scores.
        deviations: ``[layers * rows, splits]``, sums over the heads.
        sources: what all kernels take that read keys.
        cut: constants of all kernels that cut contexts, and how they are compiled.
        shape: constants of those that read keys.
        of_heads: constants of those that look at all heads.
        warps: of a program.
    """

    def __init__(self, layers: PagedLayers, rows: PagedRows, padded: int, workspace: Workspace, programs: int = 0) -> None:
        number, many, heads, head_dim = rows.shape
        cache = layers.caches[0]
        kv_heads = cache.shape[1]
        splits = splits_of(rows.longest)
        self.layers, self.rows, self.padded, self.heads = layers, rows, padded, heads
        self.number, self.many, self.splits, self.programs = number, many, splits, programs
        sizes = sizes_of(number, many, heads, splits, programs > 0)
        parts = dict(zip(sizes, _carved(workspace.buffer, list(sizes.values())), strict=True))
        of_row = heads * (-(-rows.longest // TILE) * TILE)
        # Of a program that takes whole rows, or of a layer.
        self.room = of_row if programs else (workspace.buffer.numel() - sum(sizes.values())) // number // TILE * TILE
        self.scratch = workspace.buffer[sum(sizes.values()) :]
        self.offsets, self.without = parts["offsets"].view(torch.int64), parts["without"].view(torch.int32)
        self.partial, self.own = parts["partial"], parts["own"]
        self.found = parts["found"][: number * many * 3 * heads].view(-1, 3, heads)
        self.deviations = parts["deviations"][: number * many * splits].view(-1, splits)
        # Never read where the constants say that there are none.
        slopes = layers.factors if layers.alibi_slopes is None else layers.alibi_slopes
        self.sources = (
            *(rows.query_addresses, layers.addresses, rows.tables, rows.table_width, rows.requests, rows.query_rows),
            *(rows.lengths, layers.factors, layers.scales, slopes, number, many, splits, *cache.stride()),
        )
        group = heads // kv_heads
        # As PyTorch computes: no product is added before it is rounded. Else the largest score less itself would be what
        # rounding took from it: of 1e30 some 1e22, whose exp() is no number.
        self.cut = {"TILE": TILE, "SPLITS": SPLITS, "LEAST": LEAST, "enable_fp_fusion": False}
        self.shape = {
            **self.cut,
            "HEADS": heads,
            "GROUP": group,
            # The least that a matrix product takes.
            "ROWS": max(16, power_of_2(group)),
            "HEAD_DIM": head_dim,
            "DIMS": max(16, power_of_2(head_dim)),
            "BLOCK_SIZE": cache.shape[2],
            "QUERY": _TYPES[rows.queries[0].dtype],
            "ELEMENT": _TYPES[cache.dtype],
            "SOFTCAP": layers.capped,
            "ALIBI": layers.alibi_slopes is not None,
        }
        # So many that a thread's share of a tile fits its registers (test_machine_code_attention.py).
        wide = self.shape["ROWS"] > 16 or rows.queries[0].dtype == torch.float32
        # Sums are spread over as many in all kernels, so that they come to the same bits.
        self.warps = 16 if self.shape["ROWS"] > 64 else 8 if wide else 4
        self.of_heads = {**self.cut, "HEADS": heads, "HEADS_2": power_of_2(heads)}
        # Room for the scores of all rows, whichever they are: then none is without.
        self.room_for_all = self.room >= many * of_row


def _carved(buffer: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """The first parts of a buffer."""
    start = 0
    for size in sizes:
        yield buffer[start : start + size]
        start += size
