"""A row's candidates where they stand: what is said of all of them, what is kept, and how they are written.

What was dropped is -inf. A row may be a whole one, or what was gathered beside it.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_entropix.kernels.triton_.candidates import fill, survey

# Differences between logits are no larger: exp() of it is 0, and 0 times it is 0, which of -inf would be NaN.
FLOOR = tl.constexpr(-1e4)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def tile_of(line, start, vocabulary, BLOCK: tl.constexpr):  # noqa: N803
    """The tokens from ``start`` on, and their logits; -inf behind the last."""
    token = start + tl.arange(0, BLOCK)
    return token, tl.load(line + token, mask=token < vocabulary, other=-float("inf"))


@triton.jit
def measured(line, vocabulary, scale, wants_sums, wants_spread, BLOCK: tl.constexpr):  # noqa: N803
    """What stages ask of a row whose logits count ``scale`` times, in one pass.

    Returns:
        The largest logit and its first token, as ``survey`` tells them; number of the candidates, their weight, and the weight
        times its logarithm, if these are wanted; the population standard deviation of their logits, if that is.
    """
    highest, best = tl.full((), -float("inf"), tl.float32), tl.full((), 0, tl.int32)
    invalid, number = tl.full((), 2**31 - 1, tl.int32), tl.full((), 0, tl.int32)
    total, product = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    mean, square = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        invalid = tl.minimum(invalid, tl.min(tl.where(x != x, token, 2**31 - 1), axis=0))
        x = tl.where(x != x, -float("inf"), x)
        here = tl.max(x, axis=0)
        first = tl.min(tl.where(x == here, token, 2**31 - 1), axis=0)
        best = tl.where(here > highest, first, best)
        before, highest = highest, tl.maximum(highest, here)
        usable = (highest > -float("inf")) & (highest < float("inf"))
        if usable & ((wants_sums > 0) | (wants_spread > 0)):
            below = tl.where(x > -float("inf"), (x - highest) * scale, -float("inf"))
            inside = below > -float("inf")
            below = tl.where(inside, below, 0.0)
            count = tl.sum(inside.to(tl.int32), axis=0)
            if wants_sums > 0:
                # What was summed up beside a smaller largest logit.
                fall = tl.where(number > 0, (before - highest) * scale, 0.0)
                shrunk = tl.exp(fall).to(tl.float64)
                product = (product + tl.maximum(fall, FLOOR).to(tl.float64) * total) * shrunk
                weight = tl.where(inside, tl.exp(below), 0.0)
                total = total * shrunk + tl.sum(weight, axis=0).to(tl.float64)
                product += tl.sum(weight * tl.maximum(below, FLOOR), axis=0).to(tl.float64)
            if (wants_spread > 0) & (count > 0):
                # Merged tile by tile (Chan, Golub and LeVeque 1979), so that nothing cancels.
                own = tl.sum(below, axis=0) / count
                deviation = tl.where(inside, below - own, 0.0)
                level = (highest * scale).to(tl.float64) + own.to(tl.float64)
                away, both = level - mean, (number + count).to(tl.float64)
                square += tl.sum(deviation * deviation, axis=0).to(tl.float64) + away * away * number * count / both
                mean += away * count / both
            number += count
    has_nan = invalid < 2**31 - 1
    highest, best = tl.where(has_nan, float("inf"), highest), tl.where(has_nan, invalid, best)
    return highest, best, number, total, product, tl.sqrt(square / tl.maximum(number, 1))


@triton.jit
def keep_alone(line, vocabulary, token, BLOCK: tl.constexpr):  # noqa: N803
    """One candidate has all of the probability."""
    fill(line, vocabulary, BLOCK)
    tl.store(line + token, 0.0)
    tl.debug_barrier()


@triton.jit
def scale_row(line, vocabulary, highest, factor, BLOCK: tl.constexpr):  # noqa: N803
    """Replace each logit by (logit - highest) · factor."""
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        tl.store(line + token, (x - highest) * factor, mask=token < vocabulary)
    tl.debug_barrier()


@triton.jit
def keep_within(line, vocabulary, highest, distance, BLOCK: tl.constexpr):  # noqa: N803
    """Keep candidates whose logit is no further from the largest than ``distance``, which is 0 or less."""
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        kept = ((x - highest).to(tl.float64) >= distance) | (x == highest)
        tl.store(line + token, tl.where(kept, x, -float("inf")), mask=token < vocabulary)
    tl.debug_barrier()


@triton.jit
def gather(
    line,
    vocabulary,
    border,
    values,
    ids,
    BLOCK: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
):
    """Copy the candidates from ``border`` on, if there is room for all; how many there are."""
    count = tl.full((), 0, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        reached = (x >= border).to(tl.int32)
        index = count + tl.cumsum(reached, axis=0) - 1
        fits = (reached > 0) & (index < CAPACITY)
        tl.store(values + index, x, mask=fits)
        tl.store(ids + index, token, mask=fits)
        count += tl.sum(reached, axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def put_back(line, vocabulary, values, ids, count, BLOCK: tl.constexpr):  # noqa: N803
    """Write what was gathered to its tokens' places in the row, and exclude the others."""
    fill(line, vocabulary, BLOCK)
    for start in tl.range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < count
        token = tl.load(ids + index, mask=inside, other=0)
        tl.store(line + token, tl.load(values + index, mask=inside, other=0.0), mask=inside)


@triton.jit
def write_row(line, vocabulary, greedy, BLOCK: tl.constexpr):  # noqa: N803
    """Replace candidates by their log-probabilities, or the best one's by 0."""
    highest, best, _number, total, _product, _spread = measured(line, vocabulary, 1.0, 1, 0, BLOCK)
    write_measured(line, vocabulary, greedy, highest, best, 1.0, total, BLOCK)


@triton.jit
def write_measured(line, vocabulary, greedy, highest, best, scale, total, BLOCK: tl.constexpr):  # noqa: N803
    """The same of logits that count ``scale`` times and weigh so much."""
    if greedy:
        keep_alone(line, vocabulary, best, BLOCK)
    else:
        log_total = tl.log(total).to(tl.float32)
        tl.debug_barrier()
        for start in tl.range(0, vocabulary, BLOCK):
            token, x = tile_of(line, start, vocabulary, BLOCK)
            tl.store(line + token, (x - highest) * scale - log_total, mask=token < vocabulary)


@triton.jit
def store_logarithm(line, vocabulary, token, p, greedy):
    """Of a probability; itself where only the best is asked for, of which rounding makes no equals."""
    log_p = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)), -float("inf"))
    tl.store(line + token, tl.where(greedy, p, log_p), mask=token < vocabulary)


@triton.jit
def keep_best(line, vocabulary, greedy, BLOCK: tl.constexpr):  # noqa: N803
    """Where ``greedy``, of probabilities."""
    tl.debug_barrier()
    if greedy:
        _highest, best = survey(line, vocabulary, BLOCK)
        keep_alone(line, vocabulary, best, BLOCK)
