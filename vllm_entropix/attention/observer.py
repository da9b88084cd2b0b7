"""The model wrapper: keeps the queries of the rows to be sampled while the model runs, and gives attention statistics after it.

During the forward pass only queries are copied, through persistent buffers and index tensors, so the copies may be captured in
CUDA graphs. Scores are computed afterwards from the kept queries and the paged keys, for the rows that need them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vllm_entropix.attention.launches import Kept, measure_layers, on_triton, readable
from vllm_entropix.attention.layers import LayerAttention, LayerRows
from vllm_entropix.attention.layouts import READERS, key_reader
from vllm_entropix.attention.paged_keys import UnsupportedAttentionError
from vllm_entropix.attention.ranks import measure_over_ranks, measure_over_ranks_by_triton
from vllm_entropix.attention.statistics import measure_layer
from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.kernels.backend import kernels_for
from vllm_entropix.kernels.ranks import RankGroup

if TYPE_CHECKING:
    from vllm_entropix.kernels.triton_.attention.workspace import Workspace
    from vllm_entropix.settings.server import AttentionRules


@dataclass
class _Step:
    """Where the rows of the running step are: tensors of the engine, read when the step's statistics are computed."""

    query_start_loc: Tensor  # [requests + 1]: request i's rows are [i], [i + 1) of the query
    seq_lens: Tensor  # [requests]: positions up to and including the request's last row
    block_table: Tensor  # [requests, blocks]
    requests: int
    longest: int  # no sequence is longer
    bounds: Tensor | None  # [requests] on the host: seq_lens, or more; None where there is one rank, which needs none


@dataclass(frozen=True)
class _Observed:
    """The layers and what is kept of them, in ascending order, and what that was made from."""

    indices: list[int]
    layers: list[LayerAttention]
    queries: list[Tensor]  # of each layer, [requests * rows of a request, heads, head_dim]
    caches: list[Tensor]
    buffers: list[Tensor]

    @cached_property
    def readable(self) -> bool:
        """Do the kernels for a GPU read all of them?"""
        return readable(self.layers)


class AttentionObserver:
    """Observes some attention layers of a loaded model.

    Args:
        layers: the layers to observe by index, modules with ``impl.forward`` and ``kv_cache`` (vLLM's ``Attention``).
        config: how statistics are taken.
        max_requests: requests in a step at most.
        rows_per_request: rows of a request that may be sampled in a step: 1, or the number of drafts + 1.
        ranks: the tensor-parallel ranks that heads are split over; None if there is one.
    """

    def __init__(
        self,
        layers: Mapping[int, Any],
        config: AttentionRules,
        max_requests: int,
        rows_per_request: int = 1,
        ranks: RankGroup | None = None,
    ) -> None:
        self.config = config
        self.layers = dict(layers)
        self.rows_per_request = rows_per_request
        self.ranks = ranks
        self._max_requests = max_requests
        # Of each layer, [requests, rows of a request, heads, head_dim].
        self._queries: dict[int, Tensor] = {}
        self._reserved_queries: list[Tensor] = []  # of several layers together
        self._workspace: Workspace | None = None
        self._exchange: Tensor | None = None
        self._steps: dict[int, _Step] = {}
        # What each builder made last, and of which step: groups of a hybrid cache may take over one another's.
        self._built: dict[int, tuple[Any, _Step]] = {}
        self._attention: dict[int, tuple[Tensor, LayerAttention]] = {}
        self._known: _Observed | None = None
        self._undo: list[Callable[[], None]] = []

    def reserve(self, dtype: torch.dtype, device: torch.device, longest: int) -> None:
        """Allocate what a GPU's steps need, before the engine measures how much memory is left for keys; nothing elsewhere.

        Args:
            dtype: of queries that no layer divides into fp8.
            device: the model's.
            longest: positions of a sequence.
        """
        readable = all(layer.attn_backend.get_name() in READERS for layer in self.layers.values())
        if kernels_for(device) != "triton" or not self.layers or not readable:
            return
        from vllm_entropix.kernels.triton_.attention.workspace import Workspace, exchange_size

        kinds: dict[tuple[int, int, torch.dtype], list[int]] = {}
        for index, layer in self.layers.items():
            own = dtype if layer.query_quant is None else torch.float8_e4m3fn
            kinds.setdefault((layer.num_heads, layer.head_size, own), []).append(index)
        for (heads, head_dim, own), indices in kinds.items():
            shape = (len(indices), self._max_requests, self.rows_per_request, heads, head_dim)
            together = torch.zeros(shape, dtype=own, device=device)
            self._reserved_queries.append(together)
            self._queries.update(zip(indices, together, strict=True))
        rows = self._max_requests * self.rows_per_request
        largest = max(self.layers.values(), key=lambda layer: layer.num_heads)
        self._workspace = Workspace.for_steps(len(self.layers), rows, largest.num_heads, longest, device)
        if self.ranks is not None:
            size = exchange_size(len(self.layers), rows, longest, self.ranks.size)
            self._exchange = torch.empty(size, dtype=torch.float32, device=device)

    def idle_memory(self) -> tuple[Tensor, ...]:
        """What :meth:`reserve` allocated, as float32 of one dimension each.

        Nothing in it is needed from where a step's attention was measured until the next forward pass.
        """
        reserved = () if self._workspace is None else (self._workspace.buffer, *self._reserved_queries)
        found = []
        for memory in (*reserved, *(() if self._exchange is None else (self._exchange,))):
            whole = memory.view(-1).view(torch.uint8)
            found.append(whole[: len(whole) // 4 * 4].view(torch.float32))
        return tuple(found)

    def attach(self, builders: Iterable[tuple[Any, Iterable[str]]]) -> None:
        """Begin to observe.

        Args:
            builders: the engine's metadata builders, each with the names of the layers it builds for.
        """
        index_of = {layer.layer_name: index for index, layer in self.layers.items()}
        for builder, names in builders:
            indices = [index_of[name] for name in names if name in index_of]
            self._watch(builder, indices)
        for index, layer in self.layers.items():
            self._record(index, layer.impl)
        if self._workspace is not None:
            from vllm_entropix.kernels.triton_.kept_queries import keep_queries

            # Compiled now: a CUDA graph may be what it is launched in first.
            for kept in self._queries.values():
                starts = torch.zeros(2, dtype=torch.int32, device=kept.device)
                keep_queries(kept.new_zeros(1, *kept.shape[2:]), starts, kept, 1)

    def detach(self) -> None:
        """Stop observing and leave the model as it was."""
        while self._undo:
            self._undo.pop()()
        self._steps.clear()
        self._built.clear()

    def _watch(self, builder: Any, indices: list[int]) -> None:
        """Note each step's tensors as the backend's metadata builder is given them: every backend has these.

        A builder of no observed layer is watched, too: observed ones may take over what it made.
        """
        original = builder.build

        def build(common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            step = _Step(
                common_attn_metadata.query_start_loc,
                common_attn_metadata.seq_lens,
                common_attn_metadata.block_table_tensor,
                common_attn_metadata.num_reqs,
                common_attn_metadata.max_seq_len,
                None if self.ranks is None else _host_bounds(common_attn_metadata),
            )
            metadata = original(common_prefix_len, common_attn_metadata, *args, **kwargs)
            self._note(builder, indices, metadata, step)
            return metadata

        builder.build = build
        self._undo.append(lambda: delattr(builder, "build"))
        original_update = getattr(builder, "update_block_table", None)
        if original_update is None:
            return

        def update_block_table(metadata: Any, block_table: Tensor, *args: Any, **kwargs: Any) -> Any:
            # Groups of a hybrid cache share another group's metadata and differ in the block table alone.
            step = next(step for made, step in self._built.values() if made is metadata)
            updated = original_update(metadata, block_table, *args, **kwargs)
            self._note(builder, indices, updated, replace(step, block_table=block_table))
            return updated

        builder.update_block_table = update_block_table
        self._undo.append(lambda: delattr(builder, "update_block_table"))

    def _note(self, builder: Any, indices: list[int], metadata: Any, step: _Step) -> None:
        self._built[id(builder)] = metadata, step
        for index in indices:
            self._steps[index] = step

    def _record(self, index: int, impl: Any) -> None:
        original = impl.forward

        def forward(layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            step = self._steps.get(index)
            if step is not None:
                self._keep(index, query, step)
            return original(layer, query, *args, **kwargs)

        impl.forward = forward
        self._undo.append(lambda: delattr(impl, "forward"))

    def _keep(self, index: int, query: Tensor, step: _Step) -> None:
        buffer = self._queries.get(index)
        if buffer is None or buffer.dtype != query.dtype:
            buffer = query.new_zeros(self._max_requests, self.rows_per_request, *query.shape[1:])
            self._queries[index] = buffer
        requests = min(step.requests, self._max_requests)
        if kernels_for(query.device) == "triton":
            from vllm_entropix.kernels.triton_.kept_queries import keep_queries

            keep_queries(query, step.query_start_loc, buffer, requests)
            return
        ends = step.query_start_loc[1 : requests + 1]
        for offset in range(self.rows_per_request):
            # From the end: row -1 is the last. A request with fewer rows, or a padded one, keeps some other row, unread.
            rows = (ends - (offset + 1)).clamp(0, query.shape[0] - 1)
            buffer[:requests, offset].copy_(query.index_select(0, rows))

    def statistics(self, requests: Tensor, positions: Tensor, wanted: Tensor | None = None) -> AttentionStatistics:
        """Attention statistics of some rows of the step that has just run, the mean over the observed layers.

        Args:
            requests: int64 ``[rows]``, the request's index in the batch.
            positions: int64 ``[rows]``, the row's position in its sequence: one of the request's last ``rows_per_request``.
            wanted: bool ``[rows]``; the others get NaN and cost nothing. None: all.
        """
        return self.statistics_per_layer(requests, positions, wanted).mean_over_layers()

    def warm_up(self) -> None:
        """Measure a row of nobody that attends to one position, which compiles the CPU's kernels."""
        if self.ranks is not None:  # they measure in PyTorch there
            return
        block_table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
        for index, module in self.layers.items():
            queries = torch.zeros(1, module.num_heads, module.head_size)
            measure_layer(self._layer(index), queries, block_table, lengths, self.config)

    def last_positions(self, requests: Tensor) -> Tensor:
        """Positions of the last rows of some requests of the step, int64 ``[requests, rows_per_request]``, the last row first.

        Negative where a sequence has no such row. There must be a layer that is observed.
        """
        seq_lens = self._steps[next(iter(self.layers))].seq_lens[requests].long()
        return seq_lens.unsqueeze(-1) - torch.arange(1, self.rows_per_request + 1, device=seq_lens.device)

    def statistics_per_layer(self, requests: Tensor, positions: Tensor, wanted: Tensor | None = None) -> AttentionStatistics:
        """The same for each observed layer, in ascending order: every metric is ``[layers, rows]``."""
        if on_triton(requests.device) and (observed := self._observed()).readable:
            from vllm_entropix.kernels.triton_.kept_queries import rows_of_queries

            everything = torch.ones_like(requests, dtype=torch.bool) if wanted is None else wanted
            layers = [
                LayerRows(layer, queries, self._steps[index].block_table)
                for index, layer, queries in zip(observed.indices, observed.layers, observed.queries, strict=True)
            ]
            # All groups of layers have the same requests.
            step = next(iter(self._steps.values()))
            query_rows, lengths = rows_of_queries(requests, positions, step.seq_lens, self.rows_per_request)
            kept = Kept(query_rows, step.longest, self._workspace, self._exchange)
            if self.ranks is None:
                return measure_layers(layers, requests, lengths, everything, self.config, kept)
            assert step.bounds is not None
            bounds = step.bounds.repeat(self.rows_per_request)  # of each request, all rows may be asked for
            return measure_over_ranks_by_triton(layers, requests, lengths, everything, bounds, self.config, self.ranks, kept)
        if wanted is None:
            return self._measure_each(requests, positions)
        rows = wanted.nonzero().flatten()
        return self._measure_each(requests[rows], positions[rows]).scattered(wanted, rows)

    def _measure_each(self, requests: Tensor, positions: Tensor) -> AttentionStatistics:
        lengths = positions + 1
        layers = self._layer_rows(requests, lengths)
        if self.ranks is not None:
            return measure_over_ranks(layers, requests, lengths, self.config, self.ranks)
        return AttentionStatistics.stacked(
            [measure_layer(one.layer, one.queries, one.block_table[requests], lengths, self.config) for one in layers]
        )

    def _layer_rows(self, requests: Tensor, lengths: Tensor) -> list[LayerRows]:
        """What each observed layer has for these rows, in ascending order."""
        found = []
        for index in sorted(self.layers):
            step = self._steps[index]
            queries = self._queries[index].flatten(0, 1)[self._rows_of_queries(step, requests, lengths)]
            found.append(LayerRows(self._layer(index), queries, step.block_table))
        return found

    def _rows_of_queries(self, step: _Step, requests: Tensor, lengths: Tensor) -> Tensor:
        """Which of a layer's kept queries are those of some rows: by how far a row lies before its request's last."""
        if self.rows_per_request == 1:
            return requests
        offsets = (step.seq_lens[requests] - lengths).clamp(0, self.rows_per_request - 1)
        return requests * self.rows_per_request + offsets

    def _observed(self) -> _Observed:
        """All layers and what is kept of them: made again when the engine binds another cache, or queries are kept elsewhere.

        Of many layers it takes tenths of a millisecond. The tensors are those of the engine and of :meth:`reserve`, never
        copies: what a step keeps in them is what its statistics read.
        """
        known = self._known
        caches = [layer.kv_cache for layer in self.layers.values()]
        if known is None or not (
            all(map(operator.is_, known.caches, caches)) and all(map(operator.is_, known.buffers, self._queries.values()))
        ):
            indices = sorted(self.layers)
            layers = [self._layer(index) for index in indices]
            queries = [self._queries[index].flatten(0, 1) for index in indices]
            known = self._known = _Observed(indices, layers, queries, caches, list(self._queries.values()))
        return known

    def _layer(self, index: int) -> LayerAttention:
        layer = self.layers[index]
        known = self._attention.get(index)
        # The engine may bind another cache (after sleeping, say), so the reader is kept with the cache it reads.
        if known is None or known[0] is not layer.kv_cache:
            known = self._attention[index] = (layer.kv_cache, describe_layer(layer))
        return known[1]


def _host_bounds(metadata: Any) -> Tensor:
    """What the host knows of the requests' lengths: no device is asked. Drafts count as if all were accepted."""
    known: Tensor | None = metadata.seq_lens_cpu_upper_bound
    if known is None:
        return torch.full((metadata.num_reqs,), metadata.max_seq_len, device="cpu")
    return known[: metadata.num_reqs].clone()  # the engine's own is filled again


def find_attention_layers(model: nn.Module) -> dict[int, Any]:
    """The self-attention layers of a loaded model by layer index (the first number in the module's name).

    Layers of other pipeline stages are absent; draft models are modules of their own.
    """
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if not (hasattr(module, "impl") and hasattr(module, "kv_cache") and hasattr(module, "attn_backend")):
            continue
        number = re.search(r"\d+", getattr(module, "layer_name", name))
        found[int(number.group()) if number else len(found)] = module
    return found


def select_layers(found: Mapping[int, Any], config: AttentionRules) -> dict[int, Any]:
    """The layers that the configuration wants observed.

    Raises:
        UnsupportedAttentionError: there is no attention to observe.
        ValueError: a layer of the list has no attention.
    """
    if not found:
        raise UnsupportedAttentionError("the model has no attention layers")
    wanted = config.attention.layers
    if wanted == "last":
        last = max(found)
        return {last: found[last]}
    if wanted == "all":
        return dict(found)
    missing = [layer for layer in wanted if isinstance(layer, int) and layer not in found]
    if missing:
        raise ValueError(f"attention.layers names {missing}, but the layers with attention are {sorted(found)}")
    return {layer: found[layer] for layer in wanted if isinstance(layer, int)}


def describe_layer(layer: Any) -> LayerAttention:
    """What is needed to compute a layer's scores.

    Raises:
        UnsupportedAttentionError: the layer attends in a way that can't be followed.
    """
    impl = layer.impl
    kind = str(getattr(layer.attn_type, "value", layer.attn_type))
    if kind != "decoder":
        raise UnsupportedAttentionError(f"layer {layer.layer_name} is {kind} attention")
    if getattr(layer, "use_alibi_sqrt", False):
        raise UnsupportedAttentionError(f"layer {layer.layer_name} uses square-root ALiBi")
    if getattr(impl, "chunk_lookback", -1) >= 0:
        raise UnsupportedAttentionError(f"layer {layer.layer_name} attends to chunks of its window")
    slopes = getattr(impl, "alibi_slopes", None)
    return LayerAttention(
        keys=key_reader(layer),
        scale=float(impl.scale),
        softcap=float(getattr(impl, "logits_soft_cap", None) or 0.0),
        window=layer.sliding_window,
        alibi_slopes=None if slopes is None else torch.as_tensor(slopes, dtype=torch.float32),
        sinks=getattr(impl, "sinks", None),
        query_scale=None if layer.query_quant is None else layer._q_scale,
    )
