"""What the launches for some layers and rows share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton.language as tl

from vllm_entropix.kernels.triton_.attention.paged import PagedLayers, PagedRows
from vllm_entropix.kernels.triton_.attention.shares import LEAST, SPLITS, TILE, splits_of
from vllm_entropix.kernels.triton_.attention.workspace import Workspace
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
        offsets, without, partial, found, deviations, own, scratch: see :class:`~.workspace.Parts`.
        sources: what all kernels take that read keys.
        shape: constants of those that read keys, and how they are compiled.
        of_heads: constants of those that look at all heads.
        of_both: constants of those that do both.
        warps: of a program.
    """

    def __init__(self, layers: PagedLayers, rows: PagedRows, padded: int, workspace: Workspace, programs: int = 0) -> None:
        number, many, heads, head_dim = rows.shape
        keys, query = layers.caches[0], rows.queries[0]
        splits = splits_of(rows.longest)
        self.layers, self.rows, self.padded, self.heads = layers, rows, padded, heads
        self.number, self.many, self.splits, self.programs = number, many, splits, programs
        parts = workspace.parts(number, many, heads, splits, programs > 0)
        self.offsets, self.without, self.partial, self.found, self.deviations, self.own, self.scratch = parts
        of_row = heads * (-(-rows.longest // TILE) * TILE)
        # Of a program that takes whole rows, or of a layer.
        self.room = of_row if programs else self.scratch.shape[0] // number // TILE * TILE
        # Never read where the constants say that there are none.
        slopes = layers.factors if layers.alibi_slopes is None else layers.alibi_slopes
        self.sources = (
            *(rows.query_addresses, layers.addresses, rows.tables, rows.table_width, rows.requests, rows.query_rows),
            *(rows.lengths, layers.factors, layers.scales, slopes, number, many, splits, *keys.stride()),
        )
        self.shape, self.of_heads, self.of_both, self.warps = _constants(
            *(heads, head_dim, keys.shape[1], keys.shape[2], query.dtype, keys.dtype),
            *(layers.capped, layers.alibi_slopes is not None),
        )
        # Room for the scores of all rows, whichever they are: then none is without.
        self.room_for_all = self.room >= many * of_row


@cache
def _constants(
    heads: int,
    head_dim: int,
    kv_heads: int,
    block_size: int,
    query: torch.dtype,
    element: torch.dtype,
    capped: bool,
    alibi: bool,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]:
    """Constants of kernels that read keys, of those that look at all heads, and of those that do both; and warps."""
    group = heads // kv_heads
    # As PyTorch computes: no product is added before it is rounded. Else the largest score less itself would be what
    # rounding took from it: of 1e30 some 1e22, whose exp() is no number.
    cut = {"TILE": TILE, "SPLITS": SPLITS, "LEAST": LEAST, "enable_fp_fusion": False}
    # The least that a matrix product takes.
    rows, dims = max(16, power_of_2(group)), max(16, power_of_2(head_dim))
    shape = {
        **cut,
        "HEADS": heads,
        "GROUP": group,
        "ROWS": rows,
        "HEAD_DIM": head_dim,
        "DIMS": dims,
        "BLOCK_SIZE": block_size,
        "QUERY": _TYPES[query],
        "ELEMENT": _TYPES[element],
        "SOFTCAP": capped,
        "ALIBI": alibi,
    }
    # So many that a thread's share of a tile fits its registers (test_machine_code_attention.py).
    wide = rows > 16 or query == torch.float32
    # Sums are spread over as many in all kernels, so that they come to the same bits.
    warps = 16 if rows > 64 else 8 if wide else 4
    of_heads = {**cut, "HEADS": heads, "HEADS_2": power_of_2(heads)}
    return shape, of_heads, shape | of_heads, warps
