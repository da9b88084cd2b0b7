"""How many variants of each kernel of logits steps of different sizes take; prints those that not all sizes share.

Triton compiles a kernel anew when an integer is 1 or a multiple of 16, or a pointer isn't aligned: in the midst of serving, if
only a batch's size made the difference. Run by ``test_triton.py`` in a process without the interpreter. Nothing is launched:
the kernels' arguments are real, and what Triton would compile for them is asked.
"""

import json
import sys
from collections import defaultdict
from unittest import mock

import numpy as np
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.kernels.test_cpu import apply, mixed_logits
from vllm_entropix.distribution import backend as row_backend

SIZES = (1, 2, 3, 4, 5, 15, 16, 17, 32, 64)


def step(rows):
    """All kernels of a step but attention's (``attention_code_checks.py``)."""
    for base in ({}, {"top_k": 2000}):
        apply(mixed_logits(64, 3000, 1)[:rows], True, np.ones(rows, dtype=bool), clarification=(17, 18), base=base)


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
