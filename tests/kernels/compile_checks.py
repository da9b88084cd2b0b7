"""Compiles the kernels of logits to machine code for one kind of GPU, which takes no GPU; prints the names of those that did.

A compiler refuses things that the interpreter lets pass. Run by ``test_triton.py`` in a process without the interpreter.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_entropix.kernels.triton_ import candidates, logits_metrics, repetitions
from vllm_entropix.kernels.triton_.chain import launch

FLOATS, LONGS = "*fp32", "*i64"
# Types of arguments by name, of all kernels; what isn't named here is float32 in memory, or a constant.
TYPES = {
    **dict.fromkeys(("vocabulary", "tiles", "rows", "groups", "maxima_stride", "length"), "i32"),
    "row_stride": "i64",
    **dict.fromkeys(("top_k", "samples", "forced", "tokens", "enough", "found"), LONGS),
    "sampled": "*i1",
    **dict.fromkeys(("ids", "stages", "lowered"), "*i32"),
    **dict.fromkeys(("split", "count", "apart", "others_stride", "number_of_penalties"), "i32"),
    **dict.fromkeys(("numbers", "sums"), "*fp64"),
}
ROW = {"BLOCK": 4096, "LIMIT": candidates.LIMIT}
CHAIN = {
    "COLUMNS": len(launch.NUMBERS),
    "BLOCK": launch._BLOCK,
    "SEARCHED": launch._SEARCHED,
    "DIGIT": launch._DIGIT,
    "GROUPS": 2048,
    "CAPACITY": launch._CAPACITY,
}
GROUPS = {"COLLECT": 2048, "GROUP": 64, "GROUPS": 2048}

# Kernel, constants, types other than above, warps.
VARIANTS = (
    (logits_metrics._measure_tile, {"TILE": logits_metrics.TILE, "GROUP": 64}, {"logits": "*bf16"}, 8),
    (logits_metrics._merge_tiles, {"TILES": 32}, {}, 1),
    (logits_metrics._measure_tile, {"TILE": logits_metrics.TILE, "GROUP": 16, "tiles": 1}, {}, 8),
    (logits_metrics._merge_tiles, {"TILES": 1, "tiles": 1}, {}, 1),
    (candidates._distribute, {**ROW, **GROUPS, "CAPACITY": 256, "STEP": 32}, {"chosen": "*i32"}, 8),
    (repetitions._repetitions, {"BLOCK": 128}, {}, 4),
    (launch._chain, CHAIN, dict.fromkeys(("chosen", "greedy"), "*i1"), 16),
)


def compiled(kernel, constants, types, warps, capability):
    """The kernel's machine code."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else (TYPES | types).get(name, FLOATS) for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["cubin"]


def main():
    names = []
    for kernel, *variant in VARIANTS:
        assert compiled(kernel, *variant, capability=90)
        names.append(kernel.__name__)
    print("RESULT " + json.dumps(names))


if __name__ == "__main__":
    sys.exit(main())
