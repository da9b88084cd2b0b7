"""How the kernels are compiled: once for all sizes of a step."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton

# Integers that differ between steps or between engines, and pointers into others' buffers: of none of them takes a kernel
# variants. The addresses of keys and queries, for which alignment matters, are read from memory and checked by the host.
_NUMBERS = ("layers", "rows", "splits", "padded", "room", "table_stride", "sums_width")
_POINTERS = (
    *("queries", "addresses", "tables", "requests", "query_rows", "lengths", "wanted", "factors", "scales", "slopes", "sinks"),
    *("starts", "sums", "without"),
)


def kernel(function):
    """Compile a function once for all sizes of a step."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[name for name in _NUMBERS if name in names],
        do_not_specialize_on_alignment=[name for name in _POINTERS if name in names],
    )
