"""A context is cut into shares of tiles, whose borders depend on the row alone."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

TILE = 64
# Shares that a context is cut into at most, and tiles of a share at least.
SPLITS = 16
LEAST = 4


def splits_of(longest: int) -> int:
    """Shares that a context of this many positions is cut into."""
    return max(1, min(SPLITS, -(-longest // (TILE * LEAST))))


@triton.jit
def extent(lengths, windows, row, layer, splits, TILE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):  # noqa: N803
    """A row's length, its first position attended to, the tiles that these are in, and tiles of each share of them."""
    length = tl.load(lengths + row).to(tl.int32)
    window = tl.load(windows + layer).to(tl.int32)
    begin = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    first, last = begin // TILE, (length + TILE - 1) // TILE
    share = tl.maximum((last - first + SPLITS - 1) // SPLITS, LEAST)
    # More only if the host's bound on lengths is wrong: then there are fewer programs than shares.
    share = tl.maximum(share, (last - first + splits - 1) // splits)
    return length, begin, first, last, share
