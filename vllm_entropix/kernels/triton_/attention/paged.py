"""What is measured: layers whose keys stand in blocks, and rows with queries and block tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class PagedLayers:
    """Layers that are measured together: their caches have one type, shape and strides.

    Attributes:
        caches: ``[blocks, kv_heads, block_size, at least head_dim]`` per layer, keys first; at addresses divisible by 16.
        addresses: int64 ``[layers]``, of the caches, on the device.
        factors: float32 ``[2, layers]``: softcap (0 for none), window (0 for none).
        scales: float32 ``[layers, kv_heads]``, on the products of queries and keys.
        alibi_slopes: float32 ``[layers, heads]`` or None.
        sinks: float32 ``[layers, heads]`` or None.
        capped: is there a softcap?
    """

    caches: tuple[Tensor, ...]
    addresses: Tensor
    factors: Tensor
    scales: Tensor
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    capped: bool = False

    def part(self, chunk: slice) -> PagedLayers:
        """Some of these layers."""
        return PagedLayers(
            self.caches[chunk],
            self.addresses[chunk],
            self.factors[:, chunk].contiguous(),
            self.scales[chunk],
            None if self.alibi_slopes is None else self.alibi_slopes[chunk],
            None if self.sinks is None else self.sinks[chunk],
            self.capped,
        )


@dataclass(frozen=True)
class PagedRows:
    """Rows that are measured together, in all layers.

    Attributes:
        queries: contiguous ``[kept, heads, head_dim]`` per layer, of one type; at addresses divisible by 16.
        query_addresses: int64 ``[layers]``, their addresses, on the device.
        query_rows: int64 ``[rows]``, where a row's queries are in each of them.
        tables: int64 ``[layers]``, on the device: addresses of the layers' block tables, int32 ``[requests, blocks]``.
        table_width: elements from a request to the next in them.
        requests: int64 ``[rows]``, the rows' requests in the block tables.
        lengths: int64 ``[rows]``, positions up to and including the row's own.
        longest: none of the lengths is greater.
        wanted: bool ``[rows]``; the others cost nothing.
        block_tables: the tensors that ``tables`` has the addresses of, to keep them.
    """

    queries: tuple[Tensor, ...]
    query_addresses: Tensor
    query_rows: Tensor
    tables: Tensor
    table_width: int
    requests: Tensor
    lengths: Tensor
    longest: int
    wanted: Tensor
    block_tables: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """How many layers, rows, heads, and the head size."""
        _, heads, head_dim = self.queries[0].shape
        return len(self.queries), len(self.lengths), heads, head_dim

    def part(self, layers: slice = slice(None), rows: slice = slice(None)) -> PagedRows:
        """Some of the rows in some of the layers."""
        return replace(
            self,
            queries=self.queries[layers],
            query_addresses=self.query_addresses[layers],
            tables=self.tables[layers],
            block_tables=self.block_tables[layers],
            query_rows=self.query_rows[rows],
            requests=self.requests[rows],
            lengths=self.lengths[rows],
            wanted=self.wanted[rows],
        )
