"""Attention statistics of decoding rows, over vLLM's own paged attention (CPU) and over a copy of the keys' bytes (GPU)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import add_out, finish, integers, medians_ms, paired, peak_extra_bytes, quiet, ratio

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Layers:
    """Layers of one shape, their keys and values in a paged cache, and a batch of rows that each decode one token.

    Blocks are dealt to the rows at random, as in a server that has run for a while.
    """

    def __init__(self, options: argparse.Namespace, rows: int, context: int, layers: int) -> None:
        self.device, self.dtype = torch.device(options.device), DTYPES[options.dtype]
        self.heads, self.kv_heads, self.head_dim = options.heads, options.kv_heads, options.head_dim
        self.rows, self.context, self.size = rows, context, options.block_size
        generator = torch.Generator().manual_seed(0)
        per_row = -(-context // self.size)
        order = torch.randperm(rows * per_row, generator=generator)
        self.table = order.view(rows, per_row).to(torch.int32).to(self.device)
        self.lengths = torch.full((rows,), context, dtype=torch.int64, device=self.device)
        self.scale = self.head_dim**-0.5
        shape = (rows * per_row, self.kv_heads, self.size, 2 * self.head_dim)
        self.caches = [torch.empty(shape, dtype=self.dtype, device=self.device).normal_() for _ in range(layers)]
        self.queries = torch.randn(layers, rows, self.heads, self.head_dim, generator=generator).to(self.device, self.dtype)

    @property
    def key_bytes(self) -> int:
        """Bytes of the keys that the rows attend to, all layers."""
        element = self.caches[0].element_size()
        return len(self.caches) * self.rows * self.context * self.kv_heads * self.head_dim * element


def vllm_attention(batch: Layers, isa: str) -> Callable[[], object]:
    """vLLM's CPU attention over the same caches, its schedule made beforehand (a step makes it once for all layers)."""
    from vllm import _custom_ops as ops

    starts = torch.arange(batch.rows + 1, dtype=torch.int32)
    lengths = batch.lengths.to(torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch.rows,
        num_heads=batch.heads,
        num_kv_heads=batch.kv_heads,
        head_dim=batch.head_dim,
        seq_lens=lengths,
        dtype=batch.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    output = torch.empty_like(batch.queries[0])

    def attend() -> None:
        for queries, cache in zip(batch.queries, batch.caches, strict=True):
            keys, values = cache.view(cache.shape[0], batch.kv_heads, 2 * batch.size, -1).chunk(2, dim=2)
            ops.cpu_attention_with_kv_cache(
                query=queries,
                key_cache=keys,
                value_cache=values,
                output=output,
                query_start_loc=starts,
                seq_lens=lengths,
                scale=batch.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=batch.table,
                softcap=0.0,
                scheduler_metadata=schedule,
                s_aux=None,
            )

    return attend


def cpu_actions(batch: Layers) -> tuple[dict[str, Callable[[], object]], str]:
    """What is timed on a CPU, and the instruction set that vLLM keeps its keys for."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from vllm_entropix import EntropixConfig
    from vllm_entropix.attention import LayerAttention, measure_layer
    from vllm_entropix.attention.paged_keys import CpuAmxKeys, CpuVectorKeys

    isa = _get_attn_isa(batch.dtype, batch.size, batch.head_dim)
    reader = {"amx": CpuAmxKeys, "vec": CpuVectorKeys, "vec16": CpuVectorKeys}[isa]
    layers = [LayerAttention(reader(cache), batch.scale) for cache in batch.caches]
    config = EntropixConfig()

    def statistics() -> None:
        for layer, queries in zip(layers, batch.queries, strict=True):
            measure_layer(layer, queries, batch.table, batch.lengths, config)

    return {"attention": vllm_attention(batch, isa), "statistics": statistics}, isa


def gpu_actions(batch: Layers) -> tuple[dict[str, Callable[[], object]], str]:
    """What is timed on a GPU: the statistics, and a copy of as many bytes as the keys have."""
    from vllm_entropix import EntropixConfig
    from vllm_entropix.attention import LayerAttention
    from vllm_entropix.attention.launches import Kept, measure_layers
    from vllm_entropix.attention.layers import LayerRows
    from vllm_entropix.attention.paged_keys import PlainKeys
    from vllm_entropix.kernels.triton_.attention.workspace import Workspace

    layers = [
        LayerRows(LayerAttention(PlainKeys(cache, batch.head_dim), batch.scale), queries, batch.table)
        for cache, queries in zip(batch.caches, batch.queries, strict=True)
    ]
    requests = torch.arange(batch.rows, device=batch.device)
    wanted, config = torch.ones_like(requests, dtype=torch.bool), EntropixConfig()
    # Allocated once, as an engine does.
    workspace = Workspace.for_steps(len(layers), batch.rows, batch.heads, batch.context, batch.device)
    kept = Kept(longest=batch.context, workspace=workspace)
    source = torch.empty(batch.key_bytes, dtype=torch.uint8, device=batch.device)
    target = torch.empty_like(source)
    return {
        "copy": lambda: target.copy_(source),
        "statistics": lambda: measure_layers(layers, requests, batch.lengths, wanted, config, kept),
    }, "plain"


def measure(options: argparse.Namespace, rows: int, context: int, layers: int) -> dict[str, Any]:
    """Times at one size."""
    batch = Layers(options, rows, context, layers)
    on_gpu = batch.device.type == "cuda"
    actions, cache = gpu_actions(batch) if on_gpu else cpu_actions(batch)
    times = paired(actions, options.repeats, synchronise=on_gpu)
    medians = medians_ms(times)
    result = {
        "rows": rows,
        "context": context,
        "layers": layers,
        "heads": batch.heads,
        "kv_heads": batch.kv_heads,
        "head_dim": batch.head_dim,
        "dtype": options.dtype,
        "cache": cache,
        "median_ms": medians,
        "statistics_key_gb_per_second": round(batch.key_bytes / medians["statistics"] / 1e6, 2),
    }
    if not on_gpu:
        return result | {"statistics_over_attention": round(ratio(times, "statistics", "attention"), 4)}
    return result | {
        # A copy reads each byte and writes it.
        "copy_gb_per_second": round(2 * batch.key_bytes / medians["copy"] / 1e6, 2),
        "bandwidth_over_copy": round(ratio(times, "copy", "statistics") / 2, 4),
        "peak_extra_mib": round(peak_extra_bytes(actions["statistics"], batch.device) / 2**20, 1),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    made.add_argument("--context", type=integers, default=[512, 2048, 8192], help="positions per row (default: 512,2048,8192)")
    made.add_argument("--rows", type=integers, default=[8], help="decoding rows (default: 8)")
    made.add_argument("--layers", type=integers, default=[1], help="observed layers (default: 1)")
    made.add_argument("--heads", type=int, default=32, help="query heads (default: 32)")
    made.add_argument("--kv-heads", type=int, default=8, help="key heads (default: 8)")
    made.add_argument("--head-dim", type=int, default=128, help="elements of a head (default: 128)")
    made.add_argument("--block-size", type=int, help="positions per cache block (default: 128, on a GPU 16)")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    made.add_argument("--repeats", type=int, default=20, help="paired rounds (default: 20)")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(made)
    return made


def main() -> None:
    """Parse, measure, print."""
    options = parser().parse_args()
    quiet()
    import vllm.platforms

    vllm.platforms.current_platform.import_kernels()
    options.block_size = options.block_size or (16 if options.device.startswith("cuda") else 128)
    results = []
    with torch.inference_mode():
        for context in options.context:
            for rows in options.rows:
                for layers in options.layers:
                    results.append(measure(options, rows, context, layers))
    finish("attention", results, options.out)


if __name__ == "__main__":
    main()
