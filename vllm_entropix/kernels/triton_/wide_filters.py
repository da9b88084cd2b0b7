"""The rows that ``candidates`` leaves out: a ``top_k`` too large for a buffer, such as that of a request that sets none.

All filters keep the largest logits, equal ones in the order of their ids, so a row needs no more than one border: a value, and
how many of those equal to it stay. It is found by bisection over the bits of a float, a pass over the row for each, which the
GPU's cache answers. There is no best of n here: its rows have a ``top_k`` that ADAPTIVE caps.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.candidates import LIMIT, as_float, count_and_above, fill, kth_largest, survey

_BLOCK = 4096
# The smallest finite float32 among ordered integers; smaller ones are -inf and NaN.
_LEAST = tl.constexpr(-(2**31) + 2**23)


@triton.jit
def _mass(
    line,
    vocabulary,
    largest,
    t,
    smallest,
    border,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Summed weights of the logits above ``border`` that min_p keeps."""
    total = tl.full((), 0.0, tl.float32)
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(line + token, mask=token < vocabulary, other=-float("inf"))
        weight = tl.exp((x - largest) / t)
        total += tl.sum(tl.where((x > border) & (weight >= smallest), weight, 0.0), axis=0)
    return total


@triton.jit
def _weight_at(value, largest, t, smallest):
    """Weight of a logit; 0 for what min_p drops."""
    weight = tl.exp((value - largest) / t)
    return tl.where((value > -float("inf")) & (weight >= smallest), weight, 0.0)


@triton.jit
def _filter(
    logits,
    row_stride,
    vocabulary,
    temperature,
    top_p,
    top_k,
    min_p,
    forced,
    sampled,
    BLOCK: tl.constexpr,  # noqa: N803
    LIMIT: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.minimum(tl.load(top_k + row), vocabulary).to(tl.int32)
    if (tl.load(sampled + row) == 0) | (tl.load(forced + row) >= 0) | (k <= LIMIT):
        return
    line = logits + row * row_stride
    largest, first = survey(line, vocabulary, BLOCK)
    if (largest == float("inf")) | (largest == -float("inf")):
        fill(line, vocabulary, BLOCK)
        tl.store(line + first, 0.0)
        return
    t = tl.load(temperature + row)
    t = tl.where(t > 0, t, 1.0)
    smallest = tl.load(min_p + row)

    # top_k: as many as there are, or up to the k-th largest.
    border = tl.full((), -float("inf"), tl.float32)
    ties = tl.full((), 0, tl.int32)
    _least, finite = count_and_above(line, vocabulary, border, BLOCK)
    if finite > k:
        border, above = kth_largest(line, vocabulary, k, BLOCK)
        ties = k - above
    total = _mass(line, vocabulary, largest, t, smallest, border, BLOCK)
    total += ties * _weight_at(border, largest, t, smallest)

    # top_p: what stands before the last kept one is less than this.
    portion = tl.load(top_p + row)
    if portion < 1:
        # Above the largest logit is no mass, and that must be too little at top_p 0 as well.
        wanted = tl.maximum(portion * total, 1e-30)
        found = tl.full((), -(2**31), tl.int64)
        step = tl.full((), 2**32, tl.int64)
        for _ in tl.range(32):
            step = step >> 1
            more = _mass(line, vocabulary, largest, t, smallest, as_float(found + step), BLOCK) >= wanted
            found = tl.where(more, found + step, found)
        cut = as_float(found + 1)
        # Below top_k's border the bisection saw tokens that are gone already.
        if (found >= _LEAST - 1) & (cut >= border):
            before = _mass(line, vocabulary, largest, t, smallest, cut, BLOCK)
            weight = _weight_at(cut, largest, t, smallest)
            room = tl.ceil((wanted - before) / tl.where(weight > 0, weight, 1.0)).to(tl.int32)
            # The first candidate stays in any case.
            room = tl.maximum(room, (cut == largest).to(tl.int32))
            ties = tl.where(cut > border, room, tl.minimum(room, ties))
            border = cut

    # What min_p keeps of what is kept.
    total = tl.full((), 0.0, tl.float32)
    tied = tl.full((), 0, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(line + token, mask=token < vocabulary, other=-float("inf"))
        at_border = (x == border).to(tl.int32)
        kept = (x > border) | ((x == border) & (tied + tl.cumsum(at_border, axis=0) <= ties))
        total += tl.sum(tl.where(kept, _weight_at(x, largest, t, smallest), 0.0), axis=0)
        tied += tl.sum(at_border, axis=0)
    log_total = tl.log(total)
    tl.debug_barrier()
    tied = tl.full((), 0, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(line + token, mask=token < vocabulary, other=-float("inf"))
        at_border = (x == border).to(tl.int32)
        kept = (x > border) | ((x == border) & (tied + tl.cumsum(at_border, axis=0) <= ties))
        kept &= _weight_at(x, largest, t, smallest) > 0
        tl.store(line + token, tl.where(kept, (x - largest) / t - log_total, -float("inf")), mask=token < vocabulary)
        tied += tl.sum(at_border, axis=0)


def filter_wide_rows(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, forced: Tensor, sampled: Tensor
) -> None:
    """Overwrite the sampled rows of a ``top_k`` above ``candidates.LIMIT``; arguments as of ``candidates.distribute``."""
    rows, vocabulary = logits.shape
    if not rows:
        return
    _filter[(rows,)](
        logits,
        logits.stride(0),
        vocabulary,
        temperature,
        top_p,
        top_k,
        min_p,
        forced,
        sampled,
        BLOCK=_BLOCK,
        LIMIT=LIMIT,
        num_warps=8,
        maxnreg=128,  # left alone, the compiler spills some to save others
    )
