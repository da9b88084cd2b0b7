"""A chain's filters and temperatures on a GPU: what ``samplers.chain.outcome`` does, in one launch and without a sort.

A row is one program's, and its candidates stay where they are: what a stage drops becomes -inf. A border by number or weight
is found three bits at a time of the order that a float's bits have, each by another pass over the row, which is in the
second-level cache by then. XTC's two sides share the row where nothing but min_p and temperatures comes behind: they differ by
the top choices, which are those above one logit. Behind other stages the second side is a copy.

As soon as a stage has left few candidates they are gathered beside the row, by ascending id, and the other stages work on them;
where top_k, min_p or top_p comes first, they are gathered in one pass, by a logit that all they keep is sure to reach.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.chains import STAGES, numbers_of
from vllm_entropix.kernels.triton_.candidates import fill, kth_of_maxima, ordered, survey
from vllm_entropix.kernels.triton_.sizes import power_of_2

_BLOCK = 4096
# Columns of a row's numbers.
NUMBERS = numbers_of("triton")
# Each is compared with all borders of a digit.
_SEARCHED = 1024
# Penalised tokens that are looked up at a time: one by each thread, or registers run short.
_LOOKED_UP = tl.constexpr(512)
# Borders that a pass compares with: a digit of three bits.
_DIGIT = 8
# Candidates that are worked on beside the row.
_CAPACITY = 4096
# Behind these a side of XTC is what lies above one logit, times a factor.
_BEHIND_XTC = frozenset(map(STAGES.index, ("min_p", "temperature", "dynatemp")))
_TEMPERATURE = tl.constexpr(STAGES.index("temperature"))
_DYNATEMP = tl.constexpr(STAGES.index("dynatemp"))
_TOP_K = tl.constexpr(STAGES.index("top_k"))
_TOP_P = tl.constexpr(STAGES.index("top_p"))
_MIN_P = tl.constexpr(STAGES.index("min_p"))
_TOP_N_SIGMA = tl.constexpr(STAGES.index("top_n_sigma"))
_TYP_P = tl.constexpr(STAGES.index("typ_p"))
_DRY = tl.constexpr(STAGES.index("dry"))
_T = tl.constexpr(NUMBERS.index("temperature"))
_RANGE = tl.constexpr(NUMBERS.index("dynatemp_range"))
_EXPONENT = tl.constexpr(NUMBERS.index("dynatemp_exponent"))
_K = tl.constexpr(NUMBERS.index("top_k"))
_P = tl.constexpr(NUMBERS.index("top_p"))
_MIN = tl.constexpr(NUMBERS.index("min_p"))
_SIGMAS = tl.constexpr(NUMBERS.index("top_n_sigma"))
_TYPICAL = tl.constexpr(NUMBERS.index("typ_p"))
_PI = tl.constexpr(NUMBERS.index("xtc_probability"))
_THRESHOLD = tl.constexpr(NUMBERS.index("xtc_threshold"))
# Of sums and ratios, as of float32: see ``distribution.survivors``.
_SLACK = tl.constexpr(16 * torch.finfo(torch.float32).eps)
# Temperatures below this are as good as 0.
_COLDEST = tl.constexpr(1e-30)
# Of a logit, in which rounding decides nothing.
_MARGIN = tl.constexpr(1e-5)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _tile(line, start, vocabulary, BLOCK: tl.constexpr):  # noqa: N803
    token = start + tl.arange(0, BLOCK)
    return token, tl.load(line + token, mask=token < vocabulary, other=-float("inf"))


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
        token, x = _tile(line, start, vocabulary, BLOCK)
        inside = _is_of_side(x, token, low, highest, excludes, least, keeper)
        below = tl.where(inside, (x - highest) * scale, 0.0)
        weight = tl.where(inside, tl.exp(below), 0.0)
        number += tl.sum(inside.to(tl.int32), axis=0)
        total += tl.sum(weight, axis=0).to(tl.float64)
        product += tl.sum(weight * below, axis=0).to(tl.float64)
    return number, total, product


@triton.jit
def _sums(line, vocabulary, highest, BLOCK: tl.constexpr):  # noqa: N803
    """The same of a row."""
    return _sums_of_side(line, vocabulary, -float("inf"), highest, 1.0, 0, 0.0, 0, BLOCK)


@triton.jit
def _dynamic(own, number, total, product):
    """dynatemp's temperature."""
    middle, reach, exponent = tl.load(own + _T), tl.load(own + _RANGE), tl.load(own + _EXPONENT)
    entropy = tl.log(total) - product / total
    share = entropy / tl.log(tl.maximum(number, 2).to(tl.float64))
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    bent = tl.exp(exponent * tl.log(tl.maximum(share, 1e-300)))
    bent = tl.where(exponent == 0, 1.0, tl.where(share == 0, 0.0, bent))
    low, high = tl.maximum(middle - reach, 0.0), middle + reach
    return tl.where(reach > 0, tl.where(number > 1, low + (high - low) * bent, 1.0), middle)


@triton.jit
def _alone(line, vocabulary, token, BLOCK: tl.constexpr):  # noqa: N803
    """One candidate has all of the probability."""
    fill(line, vocabulary, BLOCK)
    tl.store(line + token, 0.0)
    tl.debug_barrier()


@triton.jit
def _scale(line, vocabulary, highest, factor, BLOCK: tl.constexpr):  # noqa: N803
    """Replace each logit by (logit - highest) · factor."""
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = _tile(line, start, vocabulary, BLOCK)
        tl.store(line + token, (x - highest) * factor, mask=token < vocabulary)
    tl.debug_barrier()


@triton.jit
def _keep_within(line, vocabulary, highest, distance, BLOCK: tl.constexpr):  # noqa: N803
    """Keep candidates whose logit is no further from the largest than ``distance``, which is 0 or less."""
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = _tile(line, start, vocabulary, BLOCK)
        kept = ((x - highest).to(tl.float64) >= distance) | (x == highest)
        tl.store(line + token, tl.where(kept, x, -float("inf")), mask=token < vocabulary)
    tl.debug_barrier()


@triton.jit
def _spread(line, vocabulary, highest, number, BLOCK: tl.constexpr):  # noqa: N803
    """Population standard deviation of the candidates' logits."""
    mean, square = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for start in tl.range(0, vocabulary, BLOCK):
        _token, x = _tile(line, start, vocabulary, BLOCK)
        mean += tl.sum(tl.where(x > -float("inf"), x - highest, 0.0), axis=0).to(tl.float64)
    mean /= number
    for start in tl.range(0, vocabulary, BLOCK):
        _token, x = _tile(line, start, vocabulary, BLOCK)
        deviation = tl.where(x > -float("inf"), (x - highest) - mean.to(tl.float32), 0.0)
        square += tl.sum(deviation * deviation, axis=0).to(tl.float64)
    return tl.sqrt(square / number)


@triton.jit
def _keys_and_weights(x, highest, by_number, typical, log_total, entropy):
    """int64 by which candidates are ranked, ascending, and what each counts; what was dropped counts nothing.

    The larger logit comes first; where ``typical``, the surprise that is nearer to the entropy.
    """
    distance = tl.abs(log_total - (x - highest) - entropy)
    # Not -x, of which 0 would have two orders.
    keys = ordered(tl.where(typical > 0, distance, 0.0 - x))
    weights = tl.where(by_number > 0, 1.0, tl.exp(x - highest))
    return keys, tl.where(x > -float("inf"), weights, 0.0)


@triton.jit
def _weight_before(
    line,
    vocabulary,
    highest,
    borders,
    by_number,
    typical,
    log_total,
    entropy,
    BLOCK: tl.constexpr,  # noqa: N803
    DIGIT: tl.constexpr,  # noqa: N803
):
    """Weight of the candidates whose key is below each of ``borders``, float64 ``[DIGIT]``."""
    found = tl.zeros((DIGIT,), tl.float64)
    for start in tl.range(0, vocabulary, BLOCK):
        _token, x = _tile(line, start, vocabulary, BLOCK)
        keys, weights = _keys_and_weights(x, highest, by_number, typical, log_total, entropy)
        before = keys[:, None] < borders[None, :]
        found += tl.sum(tl.where(before, weights[:, None], 0.0), axis=0).to(tl.float64)
    return found


@triton.jit
def _keep_first(
    line,
    vocabulary,
    highest,
    limit,
    by_number,
    typical,
    log_total,
    entropy,
    SEARCHED: tl.constexpr,  # noqa: N803
    DIGIT: tl.constexpr,  # noqa: N803
):
    """Keep candidates, by their keys, before which there is less than ``limit``; where ``typical``, as much as it at most.

    ``limit`` is a number of candidates where ``by_number``, and a weight otherwise; it is above 0. Equals go by their ids.
    """
    place = tl.arange(0, DIGIT).to(tl.int64)
    # The largest border before which there is less: before the first of all there is nothing.
    found = tl.full((), -(2**31), tl.int64)
    step = tl.full((), 2**33, tl.int64)
    for _ in tl.range(11):
        step = step >> 3
        before = _weight_before(
            line, vocabulary, highest, found + place * step, by_number, typical, log_total, entropy, SEARCHED, DIGIT
        )
        short = (before < limit) | ((typical > 0) & (before <= limit))
        found += (tl.sum(short.to(tl.int64), axis=0) - 1) * step
    before = tl.max(
        _weight_before(line, vocabulary, highest, found + place * 0, by_number, typical, log_total, entropy, SEARCHED, DIGIT),
        axis=0,
    )
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, SEARCHED):
        token, x = _tile(line, start, vocabulary, SEARCHED)
        keys, weights = _keys_and_weights(x, highest, by_number, typical, log_total, entropy)
        ties = tl.where(keys == found, weights, 0.0)
        ahead = before + (tl.cumsum(ties, axis=0) - ties).to(tl.float64)
        stays = (ahead < limit) | ((typical > 0) & (ahead <= limit))
        kept = (keys < found) | ((keys == found) & stays)
        tl.store(line + token, tl.where(kept, x, -float("inf")), mask=token < vocabulary)
        before += tl.sum(ties, axis=0).to(tl.float64)
    tl.debug_barrier()


@triton.jit
def _places_of(ids, count, token, CAPACITY: tl.constexpr):  # noqa: N803
    """Where each ``token`` stands among ``count`` gathered ones, whose ids ascend; -1: it isn't there."""
    first, end = tl.zeros_like(token), tl.zeros_like(token) + count
    size = tl.full((), 2 * CAPACITY, tl.int32)
    while size > 1:
        size = size // 2
        middle = (first + end) // 2
        is_behind = (first < end) & (tl.load(ids + middle, mask=first < end, other=0) < token)
        end = tl.where((first < end) & (is_behind == 0), middle, end)
        first = tl.where(is_behind, middle + 1, first)
    found = tl.load(ids + first, mask=first < count, other=-1)
    return tl.where(found == token, first, -1)


@triton.jit
def _penalise(
    line,
    vocabulary,
    ids,
    gathered,
    tokens,
    penalties,
    values,
    number,
    CAPACITY: tl.constexpr,  # noqa: N803
    LOOKED_UP: tl.constexpr = _LOOKED_UP,  # noqa: N803
):
    """Take DRY's penalties off candidates' logits; of a token that has several, the largest.

    ``values`` is room for ``number`` logits: all are read before any is lower.
    """
    tl.debug_barrier()
    for turn in tl.range(2):
        for start in tl.range(0, number, LOOKED_UP):
            place = start + tl.arange(0, LOOKED_UP)
            penalty = tl.load(penalties + place, mask=place < number, other=0.0)
            index = tl.load(tokens + place, mask=place < number, other=0).to(tl.int32)
            if gathered > 0:
                index = _places_of(ids, vocabulary, index, CAPACITY)
            concerned = (penalty > 0) & (index >= 0)
            if turn == 0:
                tl.store(values + place, tl.load(line + index, mask=concerned, other=0.0) - penalty, mask=concerned)
            else:
                tl.atomic_min(line + index, tl.load(values + place, mask=concerned, other=0.0), mask=concerned)
        tl.debug_barrier()


@triton.jit
def _apply(
    line,
    vocabulary,
    code,
    own,
    weight,
    row,
    ids,
    gathered,
    tokens,
    penalties,
    values,
    number_of_penalties,
    BLOCK: tl.constexpr,  # noqa: N803
    SEARCHED: tl.constexpr,  # noqa: N803
    DIGIT: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
):
    """Let a stage drop and move a row's candidates where they stand.

    ``weight`` is theirs with that of others that weren't gathered, which top_p asks for; 0: there are no others.
    """
    highest, best = survey(line, vocabulary, BLOCK)
    number, total, product = _sums(line, vocabulary, highest, BLOCK)
    if (code == _TEMPERATURE) | (code == _DYNATEMP):
        t = tl.load(own + _T)
        if code == _DYNATEMP:
            t = _dynamic(own, number, total, product)
        if t <= 0:
            _alone(line, vocabulary, best, BLOCK)
        else:
            _scale(line, vocabulary, highest, (1.0 / tl.maximum(t, _COLDEST)).to(tl.float32), BLOCK)
    elif (code == _MIN_P) | (code == _TOP_N_SIGMA):
        smallest, sigmas = tl.load(own + _MIN), tl.load(own + _SIGMAS)
        if code == _MIN_P:
            if smallest > 0:
                _keep_within(line, vocabulary, highest, tl.log(smallest * (1 - _SLACK)), BLOCK)
        elif sigmas > 0:
            distance = -sigmas * _spread(line, vocabulary, highest, number, BLOCK) * (1 + _SLACK)
            _keep_within(line, vocabulary, highest, distance, BLOCK)
    elif code == _DRY:
        # Only here is it known where the row's begin: other stages have their registers for themselves.
        first = row * number_of_penalties
        _penalise(
            line,
            vocabulary,
            ids + row * CAPACITY,
            gathered,
            tokens + first,
            penalties + first,
            values + first,
            number_of_penalties,
            CAPACITY,
        )
    else:
        by_number, typical = (code == _TOP_K).to(tl.int32), (code == _TYP_P).to(tl.int32)
        k, p, mass = tl.load(own + _K), tl.load(own + _P), tl.load(own + _TYPICAL)
        limit = tl.where(
            code == _TOP_K, k, tl.where(code == _TOP_P, (p - _SLACK) * tl.maximum(total, weight), (mass + _SLACK) * total)
        )
        cuts = tl.where(code == _TOP_K, (k > 0) & (k < number), tl.where(code == _TOP_P, p < 1, mass < 1))
        if cuts:
            if limit > 0:
                log_total = tl.log(total).to(tl.float32)
                entropy = (tl.log(total) - product / total).to(tl.float32)
                _keep_first(line, vocabulary, highest, limit, by_number, typical, log_total, entropy, SEARCHED, DIGIT)
            else:
                _alone(line, vocabulary, best, BLOCK)


@triton.jit
def _least_of_top_choices(line, vocabulary, highest, border, BLOCK: tl.constexpr):  # noqa: N803
    """The smallest logit of a weight of at least ``border``, the last token that has it, and how many such there are."""
    least = tl.full((), float("inf"), tl.float32)
    token_of_least, number = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = _tile(line, start, vocabulary, BLOCK)
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
        if code == _MIN_P:
            smallest = tl.load(own + _MIN)
            border = highest + (tl.log(tl.maximum(smallest * (1 - _SLACK), 1e-300)) / scale).to(tl.float32)
            low = tl.where(smallest > 0, tl.maximum(low, border), low)
        else:
            t = tl.load(own + _T)
            if code == _DYNATEMP:
                number, total, product = _sums_of_side(line, vocabulary, low, highest, scale, excludes, least, keeper, BLOCK)
                t = _dynamic(own, number, total, product)
            cold = tl.where(t <= 0, 1, cold)
            scale = (scale / tl.maximum(t, _COLDEST)).to(tl.float32)
    return low, scale, cold


@triton.jit
def _write(line, vocabulary, greedy, BLOCK: tl.constexpr):  # noqa: N803
    """Replace candidates by their log-probabilities, or the best one's by 0."""
    highest, best = survey(line, vocabulary, BLOCK)
    if greedy:
        _alone(line, vocabulary, best, BLOCK)
    else:
        _number, total, _product = _sums(line, vocabulary, highest, BLOCK)
        log_total = tl.log(total).to(tl.float32)
        tl.debug_barrier()
        for start in tl.range(0, vocabulary, BLOCK):
            token, x = _tile(line, start, vocabulary, BLOCK)
            tl.store(line + token, (x - highest) - log_total, mask=token < vocabulary)


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
def _write_mixture(
    line,
    vocabulary,
    greedy,
    low,
    highest,
    scale,
    share,
    only,
    its_low,
    its_scale,
    its_share,
    least,
    keeper,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Replace candidates by their log-probabilities on both sides of the coin, or the best one's by 0."""
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = _tile(line, start, vocabulary, BLOCK)
        p = _mixture(x, token, low, highest, scale, share, only, its_low, its_scale, its_share, least, keeper)
        _store_logarithm(line, vocabulary, token, p, greedy)
    _keep_best(line, vocabulary, greedy, BLOCK)


@triton.jit
def _store_logarithm(line, vocabulary, token, p, greedy):
    """Of a probability; itself where only the best is asked for, of which rounding makes no equals."""
    log_p = tl.where(p > 0, tl.log(tl.where(p > 0, p, 1.0)), -float("inf"))
    tl.store(line + token, tl.where(greedy, p, log_p), mask=token < vocabulary)


@triton.jit
def _keep_best(line, vocabulary, greedy, BLOCK: tl.constexpr):  # noqa: N803
    """Where ``greedy``, of probabilities."""
    tl.debug_barrier()
    if greedy:
        _highest, best = survey(line, vocabulary, BLOCK)
        _alone(line, vocabulary, best, BLOCK)


@triton.jit
def _copy_other_side(line, other, vocabulary, least, keeper, BLOCK: tl.constexpr):  # noqa: N803
    """The row without the top choices, which are those above ``least`` and its equals but for ``keeper``."""
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = _tile(line, start, vocabulary, BLOCK)
        is_left = _is_of_side(x, token, -float("inf"), least, 1, least, keeper)
        tl.store(other + token, tl.where(is_left, x, -float("inf")), mask=token < vocabulary)
    tl.debug_barrier()


@triton.jit
def _write_both(line, other, vocabulary, probability, greedy, BLOCK: tl.constexpr):  # noqa: N803
    """Replace candidates by their log-probabilities on both sides of the coin, of which the second is a copy."""
    highest, _best = survey(line, vocabulary, BLOCK)
    _number, total, _product = _sums(line, vocabulary, highest, BLOCK)
    its_highest, _best = survey(other, vocabulary, BLOCK)
    _number, its_total, _product = _sums(other, vocabulary, its_highest, BLOCK)
    share, its_share = ((1 - probability) / total).to(tl.float32), (probability / its_total).to(tl.float32)
    tl.debug_barrier()
    for start in tl.range(0, vocabulary, BLOCK):
        token, x = _tile(line, start, vocabulary, BLOCK)
        _token, its_x = _tile(other, start, vocabulary, BLOCK)
        p = share * tl.exp(x - highest) + its_share * tl.exp(its_x - its_highest)
        _store_logarithm(line, vocabulary, token, p, greedy)
    _keep_best(line, vocabulary, greedy, BLOCK)


@triton.jit
def _reached_by_all(
    line,
    vocabulary,
    code,
    own,
    highest,
    maxima,
    groups,
    lowered,
    BLOCK: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
):
    """A logit that all candidates reach which this stage keeps as the first, and the weight of all where top_p asks for it.

    Where no such logit is known it is the smallest number.

    Of the groups' maxima, which are older than what DRY took off ``lowered`` logits, so many may be too large.
    """
    border, weight = tl.full((), _LOWEST, tl.float32), tl.full((), 0.0, tl.float64)
    if code == _TOP_K:
        k = tl.load(own + _K).to(tl.int32)
        if (k > 0) & (k < groups):
            border = tl.maximum(border, kth_of_maxima(maxima, groups, k + lowered, GROUPS))
    elif code == _MIN_P:
        smallest = tl.load(own + _MIN)
        if smallest > 0:
            below = tl.log(smallest * (1 - _SLACK)).to(tl.float32)
            border = tl.maximum(border, (highest + below) - _MARGIN * (1.0 + tl.abs(highest) - below))
    elif code == _TOP_P:
        p = tl.load(own + _P)
        if p < 1:
            # Smaller candidates weigh less, all taken together, than what top_p leaves out.
            number, weight, _product = _sums(line, vocabulary, highest, BLOCK)
            below = tl.log(0.999 * (1.0 - p) * weight / number).to(tl.float32)
            border = tl.maximum(border, (highest + below) - _MARGIN * (1.0 + tl.abs(highest) - below))
    return border, weight


@triton.jit
def _gather(
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
        token, x = _tile(line, start, vocabulary, BLOCK)
        reached = (x >= border).to(tl.int32)
        index = count + tl.cumsum(reached, axis=0) - 1
        fits = (reached > 0) & (index < CAPACITY)
        tl.store(values + index, x, mask=fits)
        tl.store(ids + index, token, mask=fits)
        count += tl.sum(reached, axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def _put_back(line, vocabulary, values, ids, count, BLOCK: tl.constexpr):  # noqa: N803
    """Write what was gathered to its tokens' places in the row, and exclude the others."""
    fill(line, vocabulary, BLOCK)
    for start in tl.range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < count
        token = tl.load(ids + index, mask=inside, other=0)
        tl.store(line + token, tl.load(values + index, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["split", "count", "others_stride", "apart", "number_of_penalties"])
def _chain(
    logits,
    row_stride,
    vocabulary,
    chosen,
    greedy,
    stages,
    split,
    count,
    numbers,
    shares,
    maxima,
    groups,
    lowered,
    values,
    ids,
    others,
    others_stride,
    apart,
    tokens,
    penalties,
    penalised,
    number_of_penalties,
    COLUMNS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    SEARCHED: tl.constexpr,  # noqa: N803
    DIGIT: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    CAPACITY: tl.constexpr,  # noqa: N803
):
    """A row through the stages 0 to ``count - 1``, of which ``split`` is XTC; ``count`` if there is none.

    Where ``apart``, the second side of XTC's coin is a copy.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(chosen + row) == 0:
        return
    whole, own = logits + row * row_stride, numbers + row * COLUMNS
    # What the stages work on: the row, or what was gathered of it.
    line, size = whole, tl.full((), 0, tl.int32) + vocabulary
    gathered, weight = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    tl.store(shares + row, 0.0)
    is_greedy = tl.load(greedy + row) != 0
    highest, best = survey(whole, vocabulary, BLOCK)
    if (highest == float("inf")) | (highest == -float("inf")):
        # With nothing but -inf, or with +inf or NaN, the first candidate stays alone.
        _alone(whole, vocabulary, best, BLOCK)
        return
    if split > 0:
        sure, weight = _reached_by_all(
            whole,
            vocabulary,
            tl.load(stages),
            own,
            highest,
            maxima + row * groups,
            groups,
            tl.load(lowered + row),
            BLOCK,
            GROUPS,
        )
        if sure > _LOWEST:
            number = _gather(whole, vocabulary, sure, values + row * CAPACITY, ids + row * CAPACITY, BLOCK, CAPACITY)
            if number <= CAPACITY:
                line, size, gathered = values + row * CAPACITY, number, gathered + 1
    for place in tl.range(0, split):
        code = tl.load(stages + place)
        _apply(
            line,
            size,
            code,
            own,
            tl.where(place == 0, weight, 0.0),
            row,
            ids,
            gathered,
            tokens,
            penalties,
            penalised,
            number_of_penalties,
            BLOCK,
            SEARCHED,
            DIGIT,
            CAPACITY,
        )
        if (gathered == 0) & (code != _TEMPERATURE) & (code != _DYNATEMP) & (code != _DRY):
            number = _gather(whole, vocabulary, _LOWEST, values + row * CAPACITY, ids + row * CAPACITY, BLOCK, CAPACITY)
            if number <= CAPACITY:
                line, size, gathered = values + row * CAPACITY, number, gathered + 1
    probability, threshold = tl.load(own + _PI), tl.load(own + _THRESHOLD)
    coin = (split < count) & (probability > 0) & (threshold <= 0.5)
    least, keeper, tops = tl.full((), 0.0, tl.float32), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    if coin:
        if split > 0:
            highest, best = survey(line, size, BLOCK)
        _number, total, _product = _sums(line, size, highest, BLOCK)
        border = threshold * (1 - _SLACK) * total
        least, keeper, tops = _least_of_top_choices(line, size, highest, border, BLOCK)
    if tops > 1:
        tl.store(shares + row, probability.to(tl.float32))
    if (tops > 1) & (apart == 0):
        low, scale, cold = _later(line, size, stages, split + 1, count, own, highest, 0, least, keeper, BLOCK)
        _number, total, _product = _sums_of_side(line, size, low, highest, scale, 0, least, keeper, BLOCK)
        # Of equal largest logits the first stays where it is so cold.
        share = ((1 - probability) / tl.where(cold > 0, 1.0, total)).to(tl.float32)
        only = tl.where(cold > 0, best, -1)
        its_low, its_scale, _cold = _later(line, size, stages, split + 1, count, own, least, 1, least, keeper, BLOCK)
        _number, total, _product = _sums_of_side(line, size, its_low, least, its_scale, 1, least, keeper, BLOCK)
        its_share = (probability / total).to(tl.float32)
        _write_mixture(
            line,
            size,
            is_greedy,
            low,
            highest,
            scale,
            share,
            only,
            its_low,
            its_scale,
            its_share,
            least,
            keeper,
            BLOCK,
        )
    else:
        behind, sides = tl.maximum(count - split - 1, 0), 1 + (tops > 1).to(tl.int32)
        if tops > 1:
            _copy_other_side(line, others + row * others_stride, size, least, keeper, BLOCK)
        for turn in tl.range(0, sides * behind):
            side, place = line, split + 1 + turn
            if turn >= behind:
                side, place = others + row * others_stride, place - behind
            code = tl.load(stages + place)
            _apply(
                side,
                size,
                code,
                own,
                0.0,
                row,
                ids,
                gathered,
                tokens,
                penalties,
                penalised,
                number_of_penalties,
                BLOCK,
                SEARCHED,
                DIGIT,
                CAPACITY,
            )
        if tops > 1:
            # Loaded again, so that no register keeps it while stages run.
            probability = tl.load(own + _PI)
            _write_both(line, others + row * others_stride, size, probability, is_greedy, BLOCK)
        else:
            _write(line, size, is_greedy, BLOCK)
    if gathered > 0:
        _put_back(whole, vocabulary, values + row * CAPACITY, ids + row * CAPACITY, size, BLOCK)


@cache
def _on(stages: tuple[int, ...], device: torch.device) -> Tensor:
    """The codes on a device, where a step finds them without waiting."""
    return torch.tensor(stages or (0,), dtype=torch.int32, device=device)


@cache
def _zeros(rows: int, device: torch.device) -> Tensor:
    """Zeros of int32, ``[rows]``, which all steps share."""
    return torch.zeros(rows, dtype=torch.int32, device=device)


def chain_of_rows(
    logits: Tensor,
    chosen: Tensor,
    greedy: Tensor,
    stages: tuple[int, ...],
    numbers: Tensor,
    maxima: Tensor | None = None,
    lowered: Tensor | None = None,
    penalties: tuple[Tensor, Tensor] | None = None,
    left: int | None = None,
) -> Tensor:
    """Overwrite the chosen rows with the log-probabilities they are drawn from.

    Args:
        logits: float32 ``[rows, vocab]``, last dimension contiguous, changed in place.
        chosen: bool ``[rows]``; other rows are left alone.
        greedy: bool ``[rows]``: the most probable token of what is left, alone.
        stages: the chain's, as indices of STAGES.
        numbers: float64 ``[rows, len(NUMBERS)]``.
        maxima: of the logits' groups, as ``logits_metrics`` gives them; None: what is kept first is found without them.
        lowered: int32 ``[rows]``, how many logits at most are smaller since the maxima were taken; None: none.
        penalties: where one of the stages is DRY, tokens as int64 ``[rows, any]``, and what is taken off them, float32; a
            token may come several times, and the largest counts.
        left: candidates that a row has at most when XTC comes; None: all. Where they are more than 4096, a chain with other
            stages than min_p and temperatures behind XTC takes room for the logits a second time.

    Returns:
        float32 ``[rows]``, of chosen rows: the share of the distribution in which XTC excluded top choices.
    """
    rows, vocabulary = logits.shape
    shares = torch.empty(rows, dtype=torch.float32, device=logits.device)
    maxima = logits.new_empty(rows, 0) if maxima is None else maxima
    lowered = _zeros(power_of_2(rows), logits.device) if lowered is None else lowered
    values, ids = (torch.empty(rows, _CAPACITY, dtype=one, device=logits.device) for one in (torch.float32, torch.int32))
    xtc = STAGES.index("xtc")
    split = stages.index(xtc) if xtc in stages else len(stages)
    apart = not _BEHIND_XTC.issuperset(stages[split + 1 :])
    few = left is not None and left <= _CAPACITY
    others = torch.empty(rows, (_CAPACITY if few else vocabulary) if apart else 0, device=logits.device)
    tokens, taken_off = penalties or (others.new_empty(rows, 0, dtype=torch.int64), others.new_empty(rows, 0))
    if rows:
        _chain[(rows,)](
            *(logits, logits.stride(0), vocabulary, chosen, greedy, _on(stages, logits.device), split, len(stages)),
            *(numbers.contiguous(), shares, maxima, maxima.shape[1], lowered, values, ids),
            *(others, others.stride(0), int(apart)),
            *(tokens.contiguous(), taken_off.contiguous(), torch.empty_like(taken_off), taken_off.shape[1]),
            COLUMNS=len(NUMBERS),
            BLOCK=_BLOCK,
            SEARCHED=_SEARCHED,
            DIGIT=_DIGIT,
            GROUPS=power_of_2(max(maxima.shape[1], 16)),
            CAPACITY=_CAPACITY,
            num_warps=16,
        )
    return shares
