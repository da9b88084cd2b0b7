"""The rows that ``candidates`` leaves out: a ``top_k`` too large for a buffer, such as that of a request that sets none.

All filters keep the largest logits, equal ones in the order of their ids, so a row needs no more than one border: a value, and
how many of those equal to it stay. It is found digit by digit, in the order that a float's bits have: all tiles of a row add up
what their tokens weigh by the first 12 bits, one program chooses the digit at which the sum from above reaches what is wanted,
and so for the next 12 and the last 8. Then every tile writes its tokens. So a row without a ``top_k`` is read four times, and
twice if it has no ``top_p`` either; one with both filters takes a search for each.

Weights are added as whole numbers, which come to the same in any order: a row's bits don't depend on the batch, nor on which of
its tiles is first. The largest logit is known from the maxima of groups that the metrics' pass leaves. There is no best of n
here: its rows have a ``top_k`` that ADAPTIVE caps.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.triton_.candidates import LIMIT, as_float, ordered, survey
from vllm_entropix.kernels.triton_.sizes import parts, power_of_2

_BLOCK = 4096
# Digits of a value's order: 12 bits, 12 bits and 8 bits. Of the last there are so few that each tile counts its own.
_SHIFTS = (20, 8)
_BINS = 1 << 12
_VALUES = 1 << 8
_FIRST, _LAST = tl.constexpr(_SHIFTS[0]), tl.constexpr(_SHIFTS[1])
# So many threads hold a tile that two blocks fit a multiprocessor.
_WARPS = 16

# What is known of a row, int64 each.
_FIELDS = tl.constexpr(8)
_ALONE = tl.constexpr(0)  # the token that stays alone, or one of the two below
_PATH = tl.constexpr(1)  # digits of the border so far
_ABOVE = tl.constexpr(2)  # sum of what is above these
_WANTED = tl.constexpr(3)  # the border is where the sum reaches this; 0: nothing is searched
_BORDER = tl.constexpr(4)  # order of the border: what is above stays
_TIES = tl.constexpr(5)  # as do so many of those equal to it
_TOTAL = tl.constexpr(6)  # weight of all that stays
_FLOOR = tl.constexpr(7)  # top_p's border is at least this
_MANY = tl.constexpr(-1)
_NOT_HERE = tl.constexpr(-2)

_NOTHING = tl.constexpr(-(2**31) + 2**23 - 1)  # the order of -inf
_LOWEST, _HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def _weight_at(value, largest, t, smallest):
    """Weight of a logit, 1 for the largest; 0 for what min_p drops."""
    weight = tl.exp((value - largest) / t)
    return tl.where((value > -float("inf")) & (weight >= smallest), tl.minimum(weight, 1.0), 0.0)


@triton.jit
def _whole(weight, SCALE: tl.constexpr):  # noqa: N803
    """A weight as a whole number, of which a vocabulary's sum fits 62 bits."""
    return (weight * SCALE).to(tl.int64)


@triton.jit
def _tokens(logits, row_stride, vocabulary, row, tile, BLOCK: tl.constexpr):  # noqa: N803
    """Ids of a tile, their logits, and the order of these, int32; 0.0 and -0.0 are equal."""
    token = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=-float("inf"))
    return token, x, ordered(tl.where(x == 0.0, 0.0, x)).to(tl.int32)


@triton.jit
def _amounts(x, order, border, largest, t, smallest, by_mass, SCALE: tl.constexpr):  # noqa: N803
    """What tokens above ``border`` add to the sum that is searched: their weights, or 1 each; 0 for the others."""
    weight = _whole(_weight_at(x, largest, t, smallest), SCALE)
    one = tl.full(weight.shape, 1, tl.int64)
    return tl.where(order > border, tl.where(by_mass > 0, weight, one), 0)


@triton.jit
def _least_border(
    maxima,
    groups,
    vocabulary,
    largest,
    t,
    smallest,
    portion,
    log_normaliser,
    GROUPS: tl.constexpr,  # noqa: N803
):
    """An order that the border of top_p isn't below, by the groups' maxima alone.

    They weigh no more than all tokens from them on, and all tokens together weigh no more than follows from the log-normaliser:
    at temperature 1 it is their weight, colder they weigh less, and hotter at most as much as if they were as equal as can be.
    So what is far below the border, nearly all of a row, needn't be added up by digits.
    """
    index = tl.arange(0, GROUPS)
    value = tl.load(maxima + index, mask=index < groups, other=-float("inf"))
    weight = _weight_at(value, largest, t, smallest)
    order = ordered(value)
    log_total = log_normaliser - largest
    log_total = tl.where(t > 1.0, log_total / t + tl.log(vocabulary.to(tl.float32)) * (1.0 - 1.0 / t), log_total)
    # A little more, so that rounding here decides nothing; and above the largest there is never enough.
    wanted = tl.maximum(portion * tl.exp(log_total + 1e-3 + 1e-6 * tl.abs(largest)), 1e-30)
    found = tl.full((), -(2**31), tl.int64)
    step = tl.full((), 2**32, tl.int64)
    for _ in tl.range(32):
        step = step >> 1
        enough = tl.sum(tl.where(order >= found + step, weight, 0.0), axis=0) >= wanted
        found = tl.where(enough, found + step, found)
    return found


@triton.jit(do_not_specialize=["log_normaliser"])
def _begin(
    logits,
    row_stride,
    vocabulary,
    temperature,
    top_p,
    top_k,
    min_p,
    forced,
    sampled,
    log_normaliser,
    maxima,
    groups,
    state,
    largest_of_rows,
    tallies,
    BLOCK: tl.constexpr,  # noqa: N803
    BINS: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    LIMIT: tl.constexpr,  # noqa: N803
):
    """What is known of a row before its logits are read."""
    row = tl.program_id(0).to(tl.int64)
    state += row * _FIELDS
    k = tl.minimum(tl.load(top_k + row), vocabulary).to(tl.int64)
    if (tl.load(sampled + row) == 0) | (tl.load(forced + row) >= 0) | (k <= LIMIT):
        tl.store(state + _ALONE, _NOT_HERE)
        return
    maxima += row * groups
    index = tl.arange(0, GROUPS)
    largest = tl.max(tl.load(maxima + index, mask=index < groups, other=-float("inf")), axis=0)
    if (largest == float("inf")) | (largest == -float("inf")):
        # With nothing but -inf, or with +inf or NaN, the first candidate stays alone.
        _largest, first = survey(logits + row * row_stride, vocabulary, BLOCK)
        tl.store(state + _ALONE, first)
        return
    t = tl.load(temperature + row)
    t = tl.where(t > 0, t, 1.0)
    portion = tl.load(top_p + row)
    least = _least_border(
        maxima, groups, vocabulary, largest, t, tl.load(min_p + row), portion, tl.load(log_normaliser + row), GROUPS
    )
    tl.store(tallies + row * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int64))
    tl.store(largest_of_rows + row, largest)
    tl.store(state + _ALONE, _MANY)
    tl.store(state + _PATH, 0)
    tl.store(state + _ABOVE, 0)
    tl.store(state + _WANTED, tl.where(k < vocabulary, k, 0))
    tl.store(state + _BORDER, _NOTHING)
    tl.store(state + _TIES, 0)
    tl.store(state + _TOTAL, 0)
    # Without a top_p nothing is searched, so nothing is added up by digits.
    tl.store(state + _FLOOR, tl.where(portion < 1.0, least, _HIGHEST))


@triton.jit(do_not_specialize=["shift", "by_mass"])
def _tally(
    logits,
    row_stride,
    vocabulary,
    temperature,
    min_p,
    state,
    largest_of_rows,
    tallies,
    shift,
    by_mass,
    BLOCK: tl.constexpr,  # noqa: N803
    BINS: tl.constexpr,  # noqa: N803
    SCALE: tl.constexpr,  # noqa: N803
):
    """Add up a tile's tokens by the digit at ``shift``, those that have the digits before it."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state += row * _FIELDS
    # Whatever else is done with a row, the weight of all that stays is needed.
    weighs = (by_mass > 0) & (shift == _FIRST)
    if (tl.load(state + _ALONE) != _MANY) | ((tl.load(state + _WANTED) == 0) & (weighs == 0)):
        return
    t = tl.load(temperature + row)
    t = tl.where(t > 0, t, 1.0)
    _token, x, order = _tokens(logits, row_stride, vocabulary, row, tile, BLOCK)
    border = tl.load(state + _BORDER).to(tl.int32)
    amounts = _amounts(x, order, border, tl.load(largest_of_rows + row), t, tl.load(min_p + row), by_mass, SCALE)
    if weighs:
        tl.atomic_add(state + _TOTAL, tl.sum(amounts, axis=0), sem="relaxed")
    first = shift == _FIRST
    floor = tl.where(by_mass > 0, tl.load(state + _FLOOR), _LOWEST).to(tl.int32)
    path = tl.load(state + _PATH).to(tl.int32)
    inside = (first & (order >= floor)) | ((first == 0) & ((order >> _FIRST) == path))
    # The first digit has the sign.
    digit = ((order >> shift) & (BINS - 1)) ^ tl.where(first, BINS // 2, 0)
    tl.atomic_add(tallies + row * BINS + digit, amounts, mask=inside & (amounts > 0), sem="relaxed")


@triton.jit
def _aim(state, largest, t, smallest, portion, SCALE: tl.constexpr):  # noqa: N803
    """The weight at which top_p has its border; 0 if there is nothing to search, since it is at top_k's, or nowhere."""
    above, ties = tl.load(state + _TOTAL), tl.load(state + _TIES)
    border = as_float(tl.load(state + _BORDER))
    each = _whole(_weight_at(border, largest, t, smallest), SCALE)
    total = above + ties * each
    wanted = tl.ceil(portion.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    # The first candidate stays in any case.
    wanted = tl.maximum(wanted, 1)
    cuts = portion < 1.0
    room = (wanted - above + each - 1) // tl.maximum(each, 1)
    ties = tl.where(cuts & (wanted > above), tl.minimum(ties, room), ties)
    tl.store(state + _TIES, ties)
    tl.store(state + _TOTAL, above + ties * each)
    return tl.where(cuts & (wanted <= above), wanted, 0)


@triton.jit(do_not_specialize=["shift", "by_mass"])
def _choose(
    temperature,
    top_p,
    min_p,
    state,
    largest_of_rows,
    tallies,
    shift,
    by_mass,
    BINS: tl.constexpr,  # noqa: N803
    SCALE: tl.constexpr,  # noqa: N803
):
    """The digit of the border at ``shift``, by what was added up; which is 0 again afterwards."""
    row = tl.program_id(0).to(tl.int64)
    state += row * _FIELDS
    first = shift == _FIRST
    aims = (by_mass > 0) & first
    wanted = tl.load(state + _WANTED)
    if (tl.load(state + _ALONE) != _MANY) | ((wanted == 0) & (aims == 0)):
        return
    place = tl.arange(0, BINS)
    pointer = tallies + row * BINS + (BINS - 1 - place)  # from the largest down
    tally = tl.load(pointer)
    tl.store(pointer, tl.zeros((BINS,), tl.int64))
    if aims:
        t = tl.load(temperature + row)
        t = tl.where(t > 0, t, 1.0)
        wanted = _aim(state, tl.load(largest_of_rows + row), t, tl.load(min_p + row), tl.load(top_p + row), SCALE)
    above = tl.where(first, 0, tl.load(state + _ABOVE))
    # Fewer than top_k: all of them stay.
    wanted = tl.where(first & (above + tl.sum(tally, axis=0) < wanted), 0, wanted)
    passed = tl.sum((above + tl.cumsum(tally, axis=0) < wanted).to(tl.int32), axis=0)
    digit = (BINS - 1 - passed).to(tl.int64)
    tl.store(state + _WANTED, wanted)
    tl.store(state + _ABOVE, above + tl.sum(tl.where(place < passed, tally, 0), axis=0))
    tl.store(state + _PATH, tl.where(first, digit - BINS // 2, tl.load(state + _PATH) * BINS + digit))


@triton.jit(do_not_specialize=["by_mass"])
def _count_values(
    logits,
    row_stride,
    vocabulary,
    temperature,
    min_p,
    state,
    largest_of_rows,
    counts,
    by_mass,
    BLOCK: tl.constexpr,  # noqa: N803
    VALUES: tl.constexpr,  # noqa: N803
    SCALE: tl.constexpr,  # noqa: N803
):
    """How many tokens of a tile have each of the values that the border may still have."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state += row * _FIELDS
    if (tl.load(state + _ALONE) != _MANY) | (tl.load(state + _WANTED) == 0):
        return
    t = tl.load(temperature + row)
    t = tl.where(t > 0, t, 1.0)
    _token, x, order = _tokens(logits, row_stride, vocabulary, row, tile, BLOCK)
    border = tl.load(state + _BORDER).to(tl.int32)
    amounts = _amounts(x, order, border, tl.load(largest_of_rows + row), t, tl.load(min_p + row), by_mass, SCALE)
    inside = (amounts > 0) & ((order >> _LAST) == tl.load(state + _PATH).to(tl.int32))
    found = tl.histogram(order & (VALUES - 1), VALUES, mask=inside)
    tl.store(counts + (row * tl.num_programs(1) + tile) * VALUES + tl.arange(0, VALUES), found.to(tl.int16))


@triton.jit(do_not_specialize=["by_mass"])
def _choose_value(
    temperature,
    min_p,
    state,
    largest_of_rows,
    counts,
    before,
    tiles,
    by_mass,
    TILES: tl.constexpr,  # noqa: N803
    VALUES: tl.constexpr,  # noqa: N803
    SCALE: tl.constexpr,  # noqa: N803
):
    """The border's value, how many of those equal to it stay, and how many of them are in the tiles before each."""
    row = tl.program_id(0).to(tl.int64)
    state += row * _FIELDS
    wanted = tl.load(state + _WANTED)
    if (tl.load(state + _ALONE) != _MANY) | (wanted == 0):
        return
    t = tl.load(temperature + row)
    t = tl.where(t > 0, t, 1.0)
    counts += row * tiles * VALUES
    place = tl.arange(0, VALUES)
    low = VALUES - 1 - place  # from the largest down
    found = tl.zeros((VALUES,), tl.int32)
    for index in tl.range(0, tiles):
        found += tl.load(counts + index * VALUES + low).to(tl.int32)
    order = tl.load(state + _PATH).to(tl.int32) * VALUES + low
    weight = _weight_at(as_float(order), tl.load(largest_of_rows + row), t, tl.load(min_p + row))
    each = tl.where(by_mass > 0, _whole(weight, SCALE), tl.full((VALUES,), 1, tl.int64))
    tally = found.to(tl.int64) * each
    above = tl.load(state + _ABOVE)
    passed = tl.sum((above + tl.cumsum(tally, axis=0) < wanted).to(tl.int32), axis=0)
    here = place == tl.minimum(passed, VALUES - 1)
    above += tl.sum(tl.where(place < passed, tally, 0), axis=0)
    equals = tl.sum(tl.where(here, found, 0), axis=0)
    step = tl.sum(tl.where(here, each, 0), axis=0)
    border = tl.sum(tl.where(here, order, 0), axis=0)
    ties = tl.minimum((wanted - above + step - 1) // tl.maximum(step, 1), equals)
    tl.store(state + _WANTED, 0)
    tl.store(state + _BORDER, border.to(tl.int64))
    tl.store(state + _TIES, ties)
    # A border by number is followed by a pass that weighs what stays.
    tl.store(state + _TOTAL, tl.where(by_mass > 0, above + ties * step, 0))
    tile = tl.arange(0, TILES)
    equal = tl.load(counts + tile * VALUES + (border & (VALUES - 1)), mask=tile < tiles, other=0).to(tl.int32)
    tl.store(before + row * tiles + tile, tl.cumsum(equal, axis=0) - equal, mask=tile < tiles)


@triton.jit
def _write(
    logits,
    row_stride,
    vocabulary,
    temperature,
    min_p,
    state,
    largest_of_rows,
    before,
    BLOCK: tl.constexpr,  # noqa: N803
    SCALE: tl.constexpr,  # noqa: N803
):
    """The final log-probabilities of a tile."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state += row * _FIELDS
    alone = tl.load(state + _ALONE)
    if alone == _NOT_HERE:
        return
    token = tile * BLOCK + tl.arange(0, BLOCK)
    line = logits + row * row_stride
    if alone != _MANY:
        tl.store(line + token, tl.where(token == alone, 0.0, -float("inf")), mask=token < vocabulary)
        return
    t = tl.load(temperature + row)
    t = tl.where(t > 0, t, 1.0)
    largest = tl.load(largest_of_rows + row)
    token, x, order = _tokens(logits, row_stride, vocabulary, row, tile, BLOCK)
    border = tl.load(state + _BORDER).to(tl.int32)
    tied = order == border
    rank = tl.load(before + row * tl.num_programs(1) + tile) + tl.cumsum(tied.to(tl.int32), axis=0)
    kept = (order > border) | (tied & (rank <= tl.load(state + _TIES).to(tl.int32)))
    kept &= _weight_at(x, largest, t, tl.load(min_p + row)) > 0
    log_total = tl.log(tl.load(state + _TOTAL).to(tl.float32) / SCALE)
    tl.store(line + token, tl.where(kept, (x - largest) / t - log_total, -float("inf")), mask=token < vocabulary)


Buffers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def buffers(rows: int, vocabulary: int, device: torch.device | str) -> Buffers:
    """What is kept of each row and tile between the kernels: state, largest logit, sums by digit, counts, tokens before."""
    tiles = parts(vocabulary, _BLOCK)
    return (
        torch.empty(rows, _FIELDS.value, dtype=torch.int64, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, _BINS, dtype=torch.int64, device=device),
        torch.empty(rows, tiles, _VALUES, dtype=torch.int16, device=device),
        torch.empty(rows, tiles, dtype=torch.int32, device=device),
    )


def filter_wide_rows(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    min_p: Tensor,
    forced: Tensor,
    sampled: Tensor,
    log_normaliser: Tensor,
    maxima: Tensor,
    kept: Buffers | None = None,
) -> None:
    """Overwrite the sampled rows of a ``top_k`` above ``candidates.LIMIT`` with the log-probabilities they are drawn from.

    Args:
        logits: float32 ``[rows, vocab]``, last dimension contiguous, changed in place.
        temperature: float32 ``[rows]``; 0 is taken as 1.
        top_p: float32 ``[rows]``.
        top_k: int64 ``[rows]``; the vocabulary's size or more is none.
        min_p: float32 ``[rows]``.
        forced: int64 ``[rows]``, token forced here, or -1; rows with one are left alone.
        sampled: bool ``[rows]``; other rows are left alone.
        log_normaliser: float32 ``[rows]``.
        maxima: of the logits' groups, as ``logits_metrics`` gives them.
        kept: :func:`buffers` of as many rows or more; None to allocate them.
    """
    rows, vocabulary = logits.shape
    if not rows or vocabulary <= LIMIT:
        return
    state, largest, tallies, counts, before = kept or buffers(rows, vocabulary, logits.device)
    tiles, groups = before.shape[1], maxima.shape[1]
    # The weight of a vocabulary of equal tokens is less than 2**62.
    scale = float(2 ** (62 - vocabulary.bit_length()))
    line, grid = (logits, logits.stride(0), vocabulary), (rows, tiles)
    _begin[(rows,)](
        *(*line, temperature, top_p, top_k, min_p, forced, sampled, log_normaliser, maxima, groups, state, largest, tallies),
        BLOCK=_BLOCK,
        BINS=_BINS,
        GROUPS=power_of_2(groups),
        LIMIT=LIMIT,
        num_warps=8,
    )
    of_row = (temperature, min_p, state, largest)
    for by_mass in (0, 1):  # top_k's border, then top_p's among what is left
        for shift in _SHIFTS:
            _tally[grid](*line, *of_row, tallies, shift, by_mass, BLOCK=_BLOCK, BINS=_BINS, SCALE=scale, num_warps=_WARPS)
            _choose[(rows,)](
                *(temperature, top_p, min_p, state, largest, tallies, shift, by_mass), BINS=_BINS, SCALE=scale, num_warps=_WARPS
            )
        _count_values[grid](*line, *of_row, counts, by_mass, BLOCK=_BLOCK, VALUES=_VALUES, SCALE=scale, num_warps=_WARPS)
        _choose_value[(rows,)](
            *(*of_row, counts, before, tiles, by_mass),
            TILES=power_of_2(tiles),
            VALUES=_VALUES,
            SCALE=scale,
            num_warps=4,
        )
    _write[grid](*line, *of_row, before, BLOCK=_BLOCK, SCALE=scale, num_warps=_WARPS)
