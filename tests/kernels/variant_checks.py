"""How many variants of each Triton kernel steps of different sizes take; prints those that not all sizes share.

Triton compiles a kernel anew when an integer is 1 or a multiple of 16, or a pointer isn't aligned: in the midst of serving, if
only a batch's size made the difference. Run by ``test_triton.py`` in a process without the interpreter. Nothing is launched:
the kernels' arguments are real, and what Triton would compile for them is asked.
"""

import json
import sys
from collections import defaultdict
from unittest import mock

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.kernels.test_cpu import apply, mixed_logits
from tests.kernels.triton_checks import cache_of, random
from vllm_entropix import EntropixConfig
from vllm_entropix.attention import LayerAttention
from vllm_entropix.attention.launches import measure_layers
from vllm_entropix.attention.layers import LayerRows
from vllm_entropix.attention.paged_keys import PlainKeys
from vllm_entropix.attention.ranks import measure_over_ranks_by_triton
from vllm_entropix.distribution import backend as row_backend
from vllm_entropix.kernels.ranks import RankGroup

SIZES = (1, 2, 3, 4, 5, 15, 16, 17, 32, 64)


def step(rows):
    """All kernels of a step."""
    for base in ({}, {"top_k": 2000}):
        apply(mixed_logits(64, 3000, 1)[:rows], True, np.ones(rows, dtype=bool), clarification=(17, 18), base=base)
    layers = [
        LayerRows(
            LayerAttention(PlainKeys(cache_of("heads-first", 40, 2, 16, 32, torch.float32, seed=layer), 32), 0.2),
            random(rows, 4, 32),
            torch.randint(0, 40, (rows, 5), dtype=torch.int32),
        )
        for layer in range(3)
    ]
    requests, lengths, wanted = torch.arange(rows), torch.randint(1, 80, (rows,)), torch.ones(rows, dtype=torch.bool)
    measure_layers(layers, requests, lengths, wanted, EntropixConfig())
    ranks = RankGroup(2, lambda share: torch.stack((share, share)))
    measure_over_ranks_by_triton(layers, requests, lengths, wanted, lengths, EntropixConfig(), ranks)


def main():
    backend = make_backend(GPUTarget("cuda", 90, 32))
    variants = defaultdict(lambda: defaultdict(set))
    size = 0

    def run(kernel, *args, grid, warmup, **kwargs):
        _, specialised, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
        variants[kernel.__name__][tuple(map(str, specialised))].add(size)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(row_backend, "kernels_for", return_value="triton"),
    ):
        for size in SIZES:
            step(size)
    of_some_sizes = {
        name: [sorted(sizes) for sizes in of_kernel.values() if sizes != set(SIZES)] for name, of_kernel in variants.items()
    }
    print("RESULT " + json.dumps(of_some_sizes))


if __name__ == "__main__":
    sys.exit(main())
