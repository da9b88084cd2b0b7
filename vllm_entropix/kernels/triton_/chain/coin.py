"""XTC: the two sides of its coin, with and without the top choices, and the mixture of what comes of both.

They share the row where nothing but min_p and temperatures comes behind: they differ by the top choices, which are those above
one logit. Behind other stages the second side is a copy.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from vllm_entropix.kernels.triton_.chain.codes import DYNATEMP, MIN_P, OWN_MIN_P, OWN_TEMPERATURE
from vllm_entropix.kernels.triton_.chain.rows import FLOOR, keep_best, measured, store_logarithm, tile_of
from vllm_entropix.kernels.triton_.chain.stages import COLDEST, SLACK, dynamic_temperature


@triton.jit
def _is_of_side(x, token, low, highest, excludes, least, keeper):
    """Is a candidate of a side of XTC's coin? Without the coin, of the row.

    What is left are logits of at least ``low``, and the largest; where top choices are excluded, without those from ``least``
    on but for the token ``keeper``.
    """
    kept = (x > -float("inf")) & ((x >= low) | (x == highest))
    excluded = (excludes > 0) & ((x > least) | ((x == least) & (token != keeper)))
    return kept & (excluded == 0)


@triton.jit
def _sums_of_side(line, vocabulary, low, highest, scale, excludes, least, keeper, BLOCK: tl.constexpr):  # noqa: N803
    """Number of a side's candidates, their weight, and the weight times its logarithm."""
    number = tl.full((), 0, tl.int32)
    total, product = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        inside = _is_of_side(x, token, low, highest, excludes, least, keeper)
        below = tl.where(inside, tl.maximum((x - highest) * scale, FLOOR), 0.0)
        weight = tl.where(inside, tl.exp(below), 0.0)
        number += tl.sum(inside.to(tl.int32), axis=0)
        total += tl.sum(weight, axis=0).to(tl.float64)
        product += tl.sum(weight * below, axis=0).to(tl.float64)
    return number, total, product


@triton.jit
def least_of_top_choices(line, vocabulary, highest, border, BLOCK: tl.constexpr):  # noqa: N803
    """The smallest logit of a weight of at least ``border``, the last token that has it, and how many such there are."""
    least = tl.full((), float("inf"), tl.float32)
    token_of_least, number = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        is_top = (x > -float("inf")) & (tl.exp(x - highest).to(tl.float64) >= border)
        here = tl.min(tl.where(is_top, x, float("inf")), axis=0)
        last = tl.max(tl.where(is_top & (x == here), token, -1), axis=0)
        # Tokens are seen by ascending id.
        token_of_least = tl.where((here <= least) & (last >= 0), last, token_of_least)
        least = tl.minimum(least, here)
        number += tl.sum(is_top.to(tl.int32), axis=0)
    return least, token_of_least, number


@triton.jit
def _later(line, vocabulary, stages, begin, end, own, highest, excludes, least, keeper, BLOCK: tl.constexpr):  # noqa: N803
    """A side of XTC's coin behind min_p and temperatures: its smallest logit, the factor of logits, and is it one token?"""
    cold = tl.full((), 0, tl.int32)
    low, scale = tl.full((), -float("inf"), tl.float32), tl.full((), 1.0, tl.float32)
    for place in tl.range(begin, end):
        code = tl.load(stages + place)
        if code == MIN_P:
            smallest = tl.load(own + OWN_MIN_P)
            border = highest + (tl.log(tl.maximum(smallest * (1 - SLACK), 1e-300)) / scale).to(tl.float32)
            low = tl.where(smallest > 0, tl.maximum(low, border), low)
        else:
            t = tl.load(own + OWN_TEMPERATURE)
            if code == DYNATEMP:
                number, total, product = _sums_of_side(line, vocabulary, low, highest, scale, excludes, least, keeper, BLOCK)
                t = dynamic_temperature(own, number, total, product)
            cold = tl.where(t <= 0, 1, cold)
            scale = (scale / tl.maximum(t, COLDEST)).to(tl.float32)
    return low, scale, cold


@triton.jit
def _mixture(x, token, low, highest, scale, share, only, its_low, its_scale, its_share, least, keeper):
    """Probability of candidates: by the side without exclusions, and by the other, whose largest logit is ``least``.

    Each side has its smallest logit, the factor of logits, and the coin's probability by the weight of the side. Of equals the
    first side has ``only`` one token, if that is not negative; the other has one in any case, where it is so cold.
    """
    inside = _is_of_side(x, token, low, highest, 0, least, keeper) & ((only < 0) | (token == only))
    others = _is_of_side(x, token, its_low, least, 1, least, keeper)
    found = tl.where(inside, share * tl.exp(tl.where(inside, (x - highest) * scale, 0.0)), 0.0)
    return found + tl.where(others, its_share * tl.exp(tl.where(others, (x - least) * its_scale, 0.0)), 0.0)


@triton.jit
def write_shared_sides(
    line,
    vocabulary,
    greedy,
    stages,
    begin,
    end,
    own,
    probability,
    highest,
    best,
    least,
    keeper,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Replace candidates by their log-probabilities on both sides of the coin, or the best one's by 0."""
    low, scale, cold = _later(line, vocabulary, stages, begin, end, own, highest, 0, least, keeper, BLOCK)
    _number, total, _product = _sums_of_side(line, vocabulary, low, highest, scale, 0, least, keeper, BLOCK)
    # Of equal largest logits the first stays where it is so cold.
    share = ((1 - probability) / tl.where(cold > 0, 1.0, total)).to(tl.float32)
    only = tl.where(cold > 0, best, -1)
    its_low, its_scale, _cold = _later(line, vocabulary, stages, begin, end, own, least, 1, least, keeper, BLOCK)
    _number, total, _product = _sums_of_side(line, vocabulary, its_low, least, its_scale, 1, least, keeper, BLOCK)
    its_share = (probability / total).to(tl.float32)
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        p = _mixture(x, token, low, highest, scale, share, only, its_low, its_scale, its_share, least, keeper)
        store_logarithm(line, vocabulary, token, p, greedy)
    keep_best(line, vocabulary, greedy, BLOCK)


@triton.jit
def copy_other_side(line, other, vocabulary, least, keeper, BLOCK: tl.constexpr):  # noqa: N803
    """The row without the top choices, which are those above ``least`` and its equals but for ``keeper``."""
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        is_left = _is_of_side(x, token, -float("inf"), least, 1, least, keeper)
        tl.store(other + token, tl.where(is_left, x, -float("inf")), mask=token < vocabulary)
    tl.debug_barrier()


@triton.jit
def write_copied_sides(line, other, vocabulary, probability, greedy, BLOCK: tl.constexpr):  # noqa: N803
    """Replace candidates by their log-probabilities on both sides of the coin, of which the second is a copy."""
    highest, _best, _number, total, _product, _spread = measured(line, vocabulary, 1.0, 1, 0, BLOCK)
    its_highest, _best, _number, its_total, _product, _spread = measured(other, vocabulary, 1.0, 1, 0, BLOCK)
    share, its_share = ((1 - probability) / total).to(tl.float32), (probability / its_total).to(tl.float32)
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = tile_of(line, start, vocabulary, BLOCK)
        _token, its_x = tile_of(other, start, vocabulary, BLOCK)
        p = share * tl.exp(x - highest) + its_share * tl.exp(its_x - its_highest)
        store_logarithm(line, vocabulary, token, p, greedy)
    keep_best(line, vocabulary, greedy, BLOCK)
