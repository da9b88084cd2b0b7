"""The attention kernels compiled for a GPU as steps of real engines launch them; prints what their machine code says.

Its argument is the GPU's compute capability, 90 for an H100; of others there is one shape alone.
Run by ``test_machine_code_attention.py`` in a process without the interpreter.
"""

import dataclasses
import json
import sys
from unittest import mock

import torch

from tests.support.machine_code import compiling, specialising
from vllm_entropix import EntropixConfig
from vllm_entropix.attention import LayerAttention
from vllm_entropix.attention.launches import measure_layers
from vllm_entropix.attention.layers import LayerRows
from vllm_entropix.attention.paged_keys import PlainKeys
from vllm_entropix.attention.ranks import measure_over_ranks_by_triton
from vllm_entropix.kernels.ranks import RankGroup
from vllm_entropix.kernels.triton_.attention import shares, workspace
from vllm_entropix.kernels.triton_.kept_queries import keep_queries, rows_of_queries

BFLOAT16, FP8, FLOAT32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
# Shapes of models: heads, key heads, head size, types of queries and keys, and what else their layers do.
SHAPES = {
    "llama": (32, 8, 128, BFLOAT16, BFLOAT16, {}),
    "llama in fp8": (32, 8, 128, FP8, FP8, {}),
    "llama in float32": (32, 8, 128, FLOAT32, FLOAT32, {}),
    "sinks, slopes and capped scores": (64, 8, 64, BFLOAT16, BFLOAT16, {"sinks": True, "alibi_slopes": True, "softcap": 50.0}),
}
SIZES = (1, 2, 15, 16, 17, 64, 100, 256, 1000, 1024)
LAYERS = (1, 2, 3, 16, 28, 32, 80)


def layers_of(number, rows, heads, kv_heads, head_dim, queries, keys, settings, width=64):
    """Layers with caches of a GPU's order, and a step's rows in them."""
    per_head = {name: torch.ones(heads) for name in ("alibi_slopes", "sinks") if settings.get(name)}
    settings = {"softcap": settings.get("softcap", 0.0), **per_head}
    cache = torch.empty(2, 16, kv_heads, 2 * head_dim, dtype=keys).transpose(1, 2)
    scale = torch.tensor(1.0) if keys.itemsize == 1 else None
    return [
        LayerRows(
            LayerAttention(PlainKeys(cache, head_dim, scale), 0.1, **settings),
            torch.empty(rows, heads, head_dim, dtype=queries),
            torch.zeros(rows, width, dtype=torch.int32),
        )
        for _ in range(number)
    ]


def step(layers, ranks=1):
    """All kernels of a step; none of them is run."""
    queries = layers[0].queries
    rows = len(queries)
    keep_queries(queries, torch.arange(rows + 1, dtype=torch.int32), torch.empty_like(queries).unsqueeze(1), rows)
    requests, lengths, wanted = torch.arange(rows), torch.ones(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    rows_of_queries(requests, lengths, requests.to(torch.int32), 1)
    if ranks == 1:
        measure_layers(layers, requests, lengths, wanted, EntropixConfig())
    else:
        group = RankGroup(ranks, 0, lambda share: torch.zeros(ranks, len(share)), lambda everything: None)
        measure_over_ranks_by_triton(layers, requests, lengths, wanted, lengths, EntropixConfig(), group)


def without_room(shape, rows=64):
    """Some rows find no room for their scores."""
    size = sum(workspace.sizes_of(1, rows, shape[0], shares.SPLITS).values()) + 64 * 64
    return mock.patch.object(workspace, "WORKSPACE", size)


def codes(capability=90):
    """What is said of each kernel, by the shape that it was compiled for."""
    found = {}
    for name, shape in SHAPES.items() if capability == 90 else [("llama", SHAPES["llama"])]:
        for ranks in (1, 8) if name == "llama" else (1,):
            with compiling(capability) as launched:
                with without_room(shape):
                    step(layers_of(1, 64, *shape), ranks)
                if ranks == 1:
                    step(layers_of(32, 64, *shape))  # programs that take whole rows
            for code in launched:
                told = dataclasses.asdict(code) | {
                    "narrow_loads": code.narrow_loads,
                    "wide_copies": max((loop.count(r"LDGSTS\.\S*128") for loop in code.loops), default=0),
                    "copies": max((loop.count("LDGSTS") for loop in code.loops), default=0),
                    "fused": max((loop.count(r"\bFFMA\b") for loop in code.loops), default=0),
                    "layouts": sorted(code.layouts),
                    "longest_loop": max((len(loop.instructions) for loop in code.loops), default=0),
                }
                del told["loops"], told["instructions"]
                found[f"{name}, {ranks} ranks: {code.name}"] = told
    return found


def variants():
    """How many variants of each kernel all sizes of a step and all numbers of layers take."""
    with specialising() as found, mock.patch.object(workspace, "WORKSPACE", 1 << 22):
        for layers in LAYERS:
            for size in SIZES if layers == 1 else SIZES[::3]:
                # As steps take rows, and none of them whole.
                for fewest in (workspace.FEWEST, workspace.PROGRAMS + 1):
                    with mock.patch.object(workspace, "FEWEST", fewest):
                        step(layers_of(layers, size, 4, 2, 16, BFLOAT16, BFLOAT16, {}))
    return {name: len(of_kernel) for name, of_kernel in found.items()}


def main():
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    print("RESULT " + json.dumps({"variants": variants() if capability == 90 else {}, "codes": codes(capability)}))


if __name__ == "__main__":
    sys.exit(main())
