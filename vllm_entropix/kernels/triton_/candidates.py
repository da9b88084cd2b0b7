"""Logits and parameters → final log-probabilities: ``filters.candidates``, ``filtered`` and ``best_of_n``, written in place.

Nothing is sorted. The metrics' pass leaves the maxima of small groups of logits, and the k-th largest of these is a value that
at least k logits reach, and seldom many more. Only groups that reach it are read again. What is found there is collected in the
order of its ids; which of two comes first, and what stands before or after one, is then found by comparing all pairs. So a
row's logits are read once, by the metrics, and written once. Rows of greedy, forced and opted-out requests leave early.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.logits_metrics import TILE, group_size
from vllm_entropix.kernels.triton_.sizes import parts, power_of_2

# Rows with a larger top_k are left to ``wide_filters``.
LIMIT = 1024
# Buffers are chosen from two sizes only: each is a kernel to compile.
_CAPACITIES = (256, 2 * LIMIT)
_BLOCK = 4096
_COLLECT = 2048
_PAIRS = 8192  # compared at a time
_NO_TOKEN = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(values):
    """int64 that are ordered as the float32 ``values`` are."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def as_float(order):
    """The float32 of an int64 from ``ordered``."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def fill(line, vocabulary, BLOCK: tl.constexpr):  # noqa: N803
    """Exclude all tokens of a row; what is stored to it afterwards is seen."""
    # Everyone must have read what is overwritten here.
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(line + token, -float("inf"), mask=token < vocabulary)
    tl.debug_barrier()


@triton.jit
def survey(line, vocabulary, BLOCK: tl.constexpr):  # noqa: N803
    """The largest logit and the first token that has it.

    NaN counts as larger than all else, as it does for a sort: the largest is +inf then, and the token is the first NaN's.
    """
    largest = tl.full((), -float("inf"), tl.float32)
    first = tl.full((), 0, tl.int32)
    invalid = tl.full((), _NO_TOKEN, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(line + token, mask=token < vocabulary, other=-float("inf"))
        is_nan = x != x
        x = tl.where(is_nan, -float("inf"), x)
        here = tl.max(x, axis=0)
        first_here = tl.min(tl.where(x == here, token, _NO_TOKEN), axis=0)
        first = tl.where(here > largest, first_here, first)
        largest = tl.maximum(largest, here)
        invalid = tl.minimum(invalid, tl.min(tl.where(is_nan, token, _NO_TOKEN), axis=0))
    has_nan = invalid < _NO_TOKEN
    return tl.where(has_nan, float("inf"), largest), tl.where(has_nan, invalid, first)


@triton.jit
def kth_of_maxima(maxima, groups, k, GROUPS: tl.constexpr):  # noqa: N803
    """The k-th largest of ``groups`` numbers, -inf if there are fewer."""
    index = tl.arange(0, GROUPS)
    order = ordered(tl.load(maxima + index, mask=index < groups, other=-float("inf")))
    found = tl.full((), -(2**31), tl.int64)
    step = tl.full((), 2**32, tl.int64)
    for _ in tl.range(32):
        step = step >> 1
        enough = tl.sum((order >= found + step).to(tl.int32), axis=0) >= k
        found = tl.where(enough, found + step, found)
    return tl.where(groups >= k, as_float(found), -float("inf"))


@triton.jit
def count_and_above(line, vocabulary, threshold, BLOCK: tl.constexpr):  # noqa: N803
    """How many logits are at least, and how many more than, ``threshold``."""
    least, more = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(line + token, mask=token < vocabulary, other=float("nan"))
        least += tl.sum((x >= threshold).to(tl.int32), axis=0)
        more += tl.sum((x > threshold).to(tl.int32), axis=0)
    return least, more


@triton.jit
def kth_largest(line, vocabulary, k, BLOCK: tl.constexpr):  # noqa: N803
    """The k-th largest logit, and how many are larger. There must be k finite ones, and no NaN."""
    found = tl.full((), -(2**31), tl.int64)
    step = tl.full((), 2**32, tl.int64)
    for _ in tl.range(32):
        step = step >> 1
        least, _more = count_and_above(line, vocabulary, as_float(found + step), BLOCK)
        found = tl.where(least >= k, found + step, found)
    value = as_float(found)
    _least, more = count_and_above(line, vocabulary, value, BLOCK)
    return value, more


@triton.jit
def _choose_groups(maxima, groups, threshold, chosen, GROUPS: tl.constexpr):  # noqa: N803
    """Write down the groups whose maximum is at least ``threshold``, ascending; how many there are."""
    index = tl.arange(0, GROUPS)
    largest = tl.load(maxima + index, mask=index < groups, other=-float("inf"))
    reached = ((largest >= threshold) & (largest > -float("inf"))).to(tl.int32)
    tl.store(chosen + tl.cumsum(reached, axis=0) - 1, index, mask=reached > 0)
    tl.debug_barrier()
    return tl.sum(reached, axis=0)


@triton.jit
def _collect(
    line,
    vocabulary,
    chosen,
    groups,
    threshold,
    border,
    ties,
    values,
    ids,
    BLOCK: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
):
    """Collect, from the chosen groups, logits from ``threshold`` and above ``border``, and the first ``ties`` equal to it.

    Returns how many there are.
    """
    count, tied = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    inside = tl.arange(0, BLOCK)
    for start in tl.range(0, groups, BLOCK // GROUP):
        index = start + inside // GROUP
        group = tl.load(chosen + index, mask=index < groups, other=0)
        token = group * GROUP + inside % GROUP
        x = tl.load(line + token, mask=(index < groups) & (token < vocabulary), other=-float("inf"))
        reached = (x >= threshold) & (x > -float("inf"))
        ties_here = (reached & (x == border)).to(tl.int32)
        kept = reached & ((x > border) | ((x == border) & (tied + tl.cumsum(ties_here, axis=0) <= ties)))
        index = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        fits = kept & (index < CAPACITY)
        tl.store(values + index, x, mask=fits)
        tl.store(ids + index, token, mask=fits)
        count += tl.sum(kept.to(tl.int32), axis=0)
        tied += tl.sum(ties_here, axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def _power(base, exponent):
    """``base ** exponent`` for exponents 0 to 127."""
    result = tl.full(base.shape, 1.0, tl.float32)
    for bit in tl.static_range(7):
        result = tl.where(((exponent >> bit) & 1) == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def _distribute(
    logits,
    row_stride,
    vocabulary,
    temperature,
    top_p,
    top_k,
    min_p,
    samples,
    forced,
    sampled,
    maxima,
    groups,
    chosen,
    values,
    ids,
    weights,
    BLOCK: tl.constexpr,  # noqa: N803
    COLLECT: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    LIMIT: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(sampled + row) == 0:
        return
    line = logits + row * row_stride
    token = tl.load(forced + row).to(tl.int32)
    k = tl.minimum(tl.load(top_k + row), vocabulary).to(tl.int32)
    if (token < 0) & (k > LIMIT):
        return
    largest = tl.full((), 0.0, tl.float32)
    maxima += row * groups
    chosen += row * GROUPS
    if token < 0:
        index = tl.arange(0, GROUPS)
        of_groups = tl.load(maxima + index, mask=index < groups, other=-float("inf"))
        largest = tl.max(of_groups, axis=0)
        if (largest == float("inf")) | (largest == -float("inf")):
            # With nothing but -inf, or with +inf or NaN, the first candidate stays alone.
            _largest, token = survey(line, vocabulary, BLOCK)
        elif k <= 1:
            group = tl.min(tl.where(of_groups == largest, index, GROUPS), axis=0)
            inside = group * GROUP + tl.arange(0, GROUP)
            x = tl.load(line + inside, mask=inside < vocabulary, other=-float("inf"))
            token = tl.min(tl.where(x == largest, inside, _NO_TOKEN), axis=0)
    if token >= 0:
        fill(line, vocabulary, BLOCK)
        tl.store(line + token, 0.0)
        return

    t = tl.load(temperature + row)
    t = tl.where(t > 0, t, 1.0)
    smallest = tl.load(min_p + row)
    values += row * CAPACITY
    ids += row * CAPACITY
    weights += row * CAPACITY
    # What min_p drops needn't be collected. A little lower, so that rounding here decides nothing.
    low = largest + t * tl.log(smallest) - 1e-3 * (1.0 + tl.abs(largest))
    threshold = tl.where(smallest > 0, low, -float("inf"))
    threshold = tl.maximum(threshold, kth_of_maxima(maxima, groups, k, GROUPS))
    reached = _choose_groups(maxima, groups, threshold, chosen, GROUPS)
    count = _collect(line, vocabulary, chosen, reached, threshold, -float("inf"), 0, values, ids, COLLECT, GROUP, CAPACITY)
    if count > CAPACITY:
        border, above = kth_largest(line, vocabulary, k, BLOCK)
        ties = k - above
        count = _collect(line, vocabulary, chosen, reached, threshold, border, ties, values, ids, COLLECT, GROUP, CAPACITY)

    index = tl.arange(0, CAPACITY)
    there = index < count
    value = tl.load(values + index, mask=there, other=-float("inf"))
    rank = tl.zeros((CAPACITY,), tl.int32)
    for start in tl.range(0, count, STEP):
        other = start + tl.arange(0, STEP)
        its = tl.load(values + other, mask=other < count, other=-float("inf"))[None, :]
        # The buffer is in the order of ids.
        before = (its > value[:, None]) | ((its == value[:, None]) & (other[None, :] < index[:, None]))
        rank += tl.sum((before & (other[None, :] < count)).to(tl.int32), axis=1)
    is_first = there & (rank == 0)
    weight = tl.where(is_first, 1.0, tl.exp((value - largest) / t))
    within = there & (rank < k) & ((weight >= smallest) | is_first)
    weight = tl.where(within, weight, 0.0)
    weight = weight / tl.sum(weight, axis=0)

    tl.store(weights + index, weight)
    tl.debug_barrier()
    mass = tl.zeros((CAPACITY,), tl.float32)
    for start in tl.range(0, count, STEP):
        other = start + tl.arange(0, STEP)
        its = tl.load(values + other, mask=other < count, other=-float("inf"))[None, :]
        its_weight = tl.load(weights + other, mask=other < count, other=0.0)[None, :]
        before = (its > value[:, None]) | ((its == value[:, None]) & (other[None, :] < index[:, None]))
        mass += tl.sum(tl.where(before, its_weight, 0.0), axis=1)
    portion = tl.load(top_p + row)
    weight = tl.where((mass < portion) | (portion >= 1) | is_first, weight, 0.0)
    weight = weight / tl.sum(weight, axis=0)

    draws = tl.load(samples + row).to(tl.int32)
    if draws > 1:
        tl.debug_barrier()
        tl.store(weights + index, weight)
        tl.debug_barrier()
        below = tl.zeros((CAPACITY,), tl.float32)
        equal = tl.zeros((CAPACITY,), tl.float32)
        for start in tl.range(0, count, STEP):
            other = start + tl.arange(0, STEP)
            its = tl.load(values + other, mask=other < count, other=-float("inf"))[None, :]
            its_weight = tl.load(weights + other, mask=other < count, other=0.0)[None, :]
            below += tl.sum(tl.where(its < value[:, None], its_weight, 0.0), axis=1)
            equal += tl.sum(tl.where(its == value[:, None], its_weight, 0.0), axis=1)
        below = tl.minimum(below, 1.0)
        joint = _power(tl.minimum(below + equal, 1.0), draws) - _power(below, draws)
        weight = tl.where(weight > 0, joint * (weight / tl.where(weight > 0, equal, 1.0)), 0.0)
        weight = weight / tl.sum(weight, axis=0)

    token_id = tl.load(ids + index, mask=there, other=0)
    fill(line, vocabulary, BLOCK)
    kept = there & (weight > 0)
    tl.store(line + token_id, tl.log(tl.where(kept, weight, 1.0)), mask=kept)


def buffers(
    rows: int, vocabulary: int, device: torch.device | str, capacity: int = _CAPACITIES[-1]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernel keeps of each row: groups that are chosen; values, weights and ids of what is collected."""
    groups = parts(vocabulary, TILE) * (TILE // group_size(vocabulary))
    return (
        torch.empty(rows, power_of_2(groups), dtype=torch.int32, device=device),
        torch.empty(rows, capacity, dtype=torch.float32, device=device),
        torch.empty(rows, capacity, dtype=torch.float32, device=device),
        torch.empty(rows, capacity, dtype=torch.int32, device=device),
    )


def distribute(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    samples: Tensor,
    forced: Tensor,
    sampled: Tensor,
    largest_top_k: int,
    maxima: Tensor,
    kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Overwrite the sampled rows with the log-probabilities they are drawn from, but for rows of a ``top_k`` above ``LIMIT``.

    Args:
        logits: float32 ``[rows, vocab]``, last dimension contiguous, changed in place.
        temperature: float32 ``[rows]``; 0 is argmax.
        top_p: float32 ``[rows]``.
        top_k: int64 ``[rows]``.
        min_p: float32 ``[rows]``.
        samples: int64 ``[rows]``, draws of which the most probable is kept.
        forced: int64 ``[rows]``, token forced here, or -1.
        sampled: bool ``[rows]``; other rows are left alone.
        largest_top_k: an upper bound of ``top_k``, known to the host.
        maxima: of the logits' groups, as ``logits_metrics`` gives them.
        kept: :func:`buffers` of as many rows or more, and of the larger capacity; None to allocate them.
    """
    rows, vocabulary = logits.shape
    if not rows:
        return
    capacity = _CAPACITIES[0] if 2 * largest_top_k <= _CAPACITIES[0] else _CAPACITIES[1]
    # The kernel takes a row's share by the capacity that it is launched with.
    chosen, values, weights, ids = kept or buffers(rows, vocabulary, logits.device, capacity)
    _distribute[(rows,)](
        logits,
        logits.stride(0),
        vocabulary,
        temperature,
        top_p,
        top_k,
        min_p,
        samples,
        forced,
        sampled,
        maxima,
        maxima.shape[1],
        chosen,
        values,
        ids,
        weights,
        BLOCK=_BLOCK,
        COLLECT=_COLLECT,
        GROUP=group_size(vocabulary),
        GROUPS=chosen.shape[1],
        CAPACITY=capacity,
        STEP=_PAIRS // capacity,
        LIMIT=LIMIT,
        # The larger buffer's pairs would take more registers than there are for so few threads.
        num_warps=8 if capacity == _CAPACITIES[0] else 16,
    )
