"""Compiles every Triton kernel to machine code for one kind of GPU, which takes no GPU; prints the names of those that did.

A compiler refuses things that the interpreter lets pass. Run by ``test_triton.py`` in a process without the interpreter.
"""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_entropix.kernels.triton_ import attention_statistics, candidates, logits_metrics, wide_filters

FLOATS, LONGS = "*fp32", "*i64"
# Types of arguments by name, of all kernels; what isn't named here is float32 in memory, or a constant.
TYPES = {
    **dict.fromkeys(("vocabulary", "tiles", "rows", "layers", "groups", "padded", "table_stride", "sums_width"), "i32"),
    **dict.fromkeys(("row_stride", "stride_block", "stride_head", "stride_position", "stride_dim"), "i64"),
    **dict.fromkeys(("top_k", "samples", "forced", "addresses", "tables", "requests", "lengths", "offsets", "starts"), LONGS),
    **dict.fromkeys(("sampled", "wanted"), "*i1"),
    "ids": "*i32",
}
HEADS = {"HEADS": 32, "TILE": attention_statistics.TILE, "SPLITS": attention_statistics.SPLITS}
KEYS = {**HEADS, "GROUP": 4, "ROWS": 16, "HEAD_DIM": 128, "DIMS": 128, "BLOCK_SIZE": 16}
HALF = {**KEYS, "ELEMENT": tl.bfloat16, "SOFTCAP": True, "ALIBI": True}
ROW = {"BLOCK": 4096, "GROUP": 64, "LIMIT": candidates.LIMIT}

# An argument that is 1 becomes a constant: one layer, a vocabulary of one tile, elements side by side.
ONE = {"layers": 1}
SIDE_BY_SIDE = {"stride_dim": 1}

# Kernel, constants, types other than above, warps.
VARIANTS = (
    (logits_metrics._measure_tile, {"TILE": logits_metrics.TILE}, {"logits": "*bf16"}, 8),
    (logits_metrics._merge_tiles, {"TILES": 32}, {}, 1),
    (logits_metrics._measure_tile, {"TILE": logits_metrics.TILE, "tiles": 1}, {}, 8),
    (logits_metrics._merge_tiles, {"TILES": 1, "tiles": 1}, {}, 1),
    (candidates._distribute, {**ROW, "GROUPS": 2048, "CAPACITY": 256, "STEP": 32}, {}, 8),
    (wide_filters._filter, ROW, {}, 8),
    (attention_statistics._attend, HALF | SIDE_BY_SIDE, {"queries": "*bf16"}, 4),
    (attention_statistics._attend, HALF | ONE | SIDE_BY_SIDE | {"ELEMENT": tl.float8e4nv}, {"queries": "*bf16"}, 4),
    (attention_statistics._deviate, HALF | ONE | SIDE_BY_SIDE | {"RANKS": 0}, {"queries": "*bf16"}, 4),
    (attention_statistics._deviate, HALF | SIDE_BY_SIDE | {"RANKS": -1}, {"queries": "*bf16"}, 4),
    (attention_statistics._deviate, HALF | ONE | SIDE_BY_SIDE | {"RANKS": 8}, {"queries": "*bf16"}, 4),
    (attention_statistics._merge_splits, {**HEADS, "HEADS_2": 32, "SINKS": True}, {}, 4),
    (attention_statistics._merge_splits, {**HEADS, **ONE, "HEADS_2": 32, "SINKS": False, "padded": 1}, {}, 4),
    (attention_statistics._finish, {**HEADS, "HEADS_2": 32, "RULE": 0}, {}, 4),
    (attention_statistics._finish, {**HEADS, **ONE, "HEADS_2": 32, "RULE": 2, "padded": 1}, {}, 4),
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
