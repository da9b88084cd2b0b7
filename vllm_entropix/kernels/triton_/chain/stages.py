"""Each stage of a chain but XTC, on candidates where they stand.

A border by number or weight is found three bits at a time of the order that a float's bits have, each by another pass over the
candidates.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_entropix.kernels.triton_.candidates import kth_of_maxima, ordered
from vllm_entropix.kernels.triton_.chain.codes import (
    DRY,
    DYNATEMP,
    MIN_P,
    OWN_EXPONENT,
    OWN_MIN_P,
    OWN_RANGE,
    OWN_SIGMAS,
    OWN_TEMPERATURE,
    OWN_TOP_K,
    OWN_TOP_P,
    OWN_TYP_P,
    TEMPERATURE,
    TOP_K,
    TOP_N_SIGMA,
    TOP_P,
    TYP_P,
)
from vllm_entropix.kernels.triton_.chain.rows import LOWEST, keep_alone, keep_within, measured, scale_row, tile_of

# Of sums and ratios, as of float32: see ``distribution.survivors``.
SLACK = tl.constexpr(16 * torch.finfo(torch.float32).eps)
# Temperatures below this are as good as 0.
COLDEST = tl.constexpr(1e-30)
# Of a logit, in which rounding decides nothing.
_MARGIN = tl.constexpr(1e-5)
# Penalised tokens that are looked up at a time: one by each thread, or registers run short.
_LOOKED_UP = tl.constexpr(512)


@triton.jit
def dynamic_temperature(own, number, total, product):
    """dynatemp's temperature."""
    middle, reach, exponent = tl.load(own + OWN_TEMPERATURE), tl.load(own + OWN_RANGE), tl.load(own + OWN_EXPONENT)
    entropy = tl.log(total) - product / total
    share = entropy / tl.log(tl.maximum(number, 2).to(tl.float64))
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    bent = tl.exp(exponent * tl.log(tl.maximum(share, 1e-300)))
    bent = tl.where(exponent == 0, 1.0, tl.where(share == 0, 0.0, bent))
    low, high = tl.maximum(middle - reach, 0.0), middle + reach
    return tl.where(reach > 0, tl.where(number > 1, low + (high - low) * bent, 1.0), middle)


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
        _token, x = tile_of(line, start, vocabulary, BLOCK)
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
        token, x = tile_of(line, start, vocabulary, SEARCHED)
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
def apply_stage(
    line,
    vocabulary,
    code,
    own,
    is_first,
    sums,
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

    Where the stage ``is_first`` to look at what was gathered, ``sums`` has each row's weight, and the weight times its
    logarithm, with all that wasn't.
    """
    wants_sums, wants_spread = (code != MIN_P).to(tl.int32), (code == TOP_N_SIGMA).to(tl.int32)
    highest, best, number, total, product, spread = measured(line, vocabulary, 1.0, wants_sums, wants_spread, BLOCK)
    if is_first & ((code == TOP_P) | (code == TYP_P)):
        total, product = tl.load(sums + 2 * row), tl.load(sums + 2 * row + 1)
    if (code == TEMPERATURE) | (code == DYNATEMP):
        t = tl.load(own + OWN_TEMPERATURE)
        if code == DYNATEMP:
            t = dynamic_temperature(own, number, total, product)
        if t <= 0:
            keep_alone(line, vocabulary, best, BLOCK)
        else:
            scale_row(line, vocabulary, highest, (1.0 / tl.maximum(t, COLDEST)).to(tl.float32), BLOCK)
    elif (code == MIN_P) | (code == TOP_N_SIGMA):
        smallest, sigmas = tl.load(own + OWN_MIN_P), tl.load(own + OWN_SIGMAS)
        if code == MIN_P:
            if smallest > 0:
                keep_within(line, vocabulary, highest, tl.log(smallest * (1 - SLACK)), BLOCK)
        elif sigmas > 0:
            keep_within(line, vocabulary, highest, -sigmas * spread * (1 + SLACK), BLOCK)
    elif code == DRY:
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
        by_number, typical = (code == TOP_K).to(tl.int32), (code == TYP_P).to(tl.int32)
        k, p, mass = tl.load(own + OWN_TOP_K), tl.load(own + OWN_TOP_P), tl.load(own + OWN_TYP_P)
        limit = tl.where(code == TOP_K, k, tl.where(code == TOP_P, (p - SLACK) * total, (mass + SLACK) * total))
        cuts = tl.where(code == TOP_K, (k > 0) & (k < number), tl.where(code == TOP_P, p < 1, mass < 1))
        if cuts:
            if limit > 0:
                log_total = tl.log(total).to(tl.float32)
                entropy = (tl.log(total) - product / total).to(tl.float32)
                _keep_first(line, vocabulary, highest, limit, by_number, typical, log_total, entropy, SEARCHED, DIGIT)
            else:
                keep_alone(line, vocabulary, best, BLOCK)


@triton.jit
def moves_nothing_but_scale(code, own):
    """Is the stage switched off in this row, or a plain temperature? And the factor of logits."""
    t, is_flat = tl.load(own + OWN_TEMPERATURE), (code == DYNATEMP) & (tl.load(own + OWN_RANGE) <= 0)
    heats = ((code == TEMPERATURE) | is_flat) & (t > 0)
    is_off = ((code == TOP_K) & (tl.load(own + OWN_TOP_K) <= 0)) | ((code == TOP_P) & (tl.load(own + OWN_TOP_P) >= 1))
    is_off |= ((code == MIN_P) & (tl.load(own + OWN_MIN_P) <= 0)) | ((code == TOP_N_SIGMA) & (tl.load(own + OWN_SIGMAS) <= 0))
    is_off |= (code == TYP_P) & (tl.load(own + OWN_TYP_P) >= 1)
    return heats | is_off, tl.where(heats, 1.0 / tl.maximum(t, COLDEST), 1.0).to(tl.float32)


@triton.jit
def reached_by_all(
    code,
    own,
    highest,
    scale,
    number,
    total,
    product,
    spread,
    maxima,
    groups,
    lowered,
    GROUPS: tl.constexpr,  # noqa: N803
):
    """A logit that all candidates reach which this stage keeps as the first; where none is known the smallest number.

    Of the groups' maxima, which are older than what DRY took off ``lowered`` logits, so many may be too large.
    """
    border, below = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float64)
    if code == TOP_K:
        k = tl.load(own + OWN_TOP_K).to(tl.int32)
        if k < groups:
            border = tl.maximum(border, kth_of_maxima(maxima, groups, k + lowered, GROUPS))
    elif code == MIN_P:
        below = tl.log(tl.load(own + OWN_MIN_P) * (1 - SLACK))
    elif code == TOP_N_SIGMA:
        below = -tl.load(own + OWN_SIGMAS) * spread * (1 + SLACK)
    elif (code == TOP_P) | (code == TYP_P):
        # Smaller candidates weigh less, all taken together, than what is left out of the weight.
        p = tl.where(code == TOP_P, tl.load(own + OWN_TOP_P), tl.load(own + OWN_TYP_P) + SLACK)
        below = tl.log(tl.maximum(0.999 * (1.0 - p) * total / number, 1e-300))
        # Where these are further from the entropy than the most probable one, they are what typ_p leaves out.
        below = tl.where(code == TYP_P, tl.minimum(below, 2 * tl.minimum(product / total, 0.0)), below)
    if below < 0:
        fall = (below / scale).to(tl.float32)
        border = tl.maximum(border, (highest + fall) - _MARGIN * (1.0 + tl.abs(highest) - fall))
    return border
