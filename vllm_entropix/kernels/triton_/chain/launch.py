"""The kernel that takes a row through a chain, and its launch."""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.kernels.chains import STAGES
from vllm_entropix.kernels.triton_.chain.codes import (
    DRY,
    DYNATEMP,
    NUMBERS,
    OWN_SIGMAS,
    OWN_XTC_PROBABILITY,
    OWN_XTC_THRESHOLD,
    TEMPERATURE,
    TOP_N_SIGMA,
    TOP_P,
    TYP_P,
    XTC,
)
from vllm_entropix.kernels.triton_.chain.coin import (
    copy_other_side,
    least_of_top_choices,
    write_copied_sides,
    write_shared_sides,
)
from vllm_entropix.kernels.triton_.chain.rows import (
    LOWEST,
    gather,
    keep_alone,
    keep_within,
    measured,
    put_back,
    scale_row,
    write_measured,
    write_row,
)
from vllm_entropix.kernels.triton_.chain.stages import (
    COLDEST,
    SLACK,
    apply_stage,
    dynamic_temperature,
    moves_nothing_but_scale,
    reached_by_all,
)
from vllm_entropix.kernels.triton_.sizes import power_of_2

_BLOCK = 4096
# Each is compared with all borders of a digit.
_SEARCHED = 1024
# Borders that a pass compares with: a digit of three bits.
_DIGIT = 8
# Candidates that are worked on beside the row.
_CAPACITY = 4096
# Behind these a side of XTC is what lies above one logit, times a factor.
_BEHIND_XTC = frozenset(map(STAGES.index, ("min_p", "temperature", "dynatemp")))


@triton.jit
def _begun(line, vocabulary, stages, split, own, BLOCK: tl.constexpr):  # noqa: N803
    """Pass the first stages that needn't touch the row: what is switched off, and temperatures, which are a factor of it.

    Returns:
        The next stage's place and code, -1 behind the last before XTC; the factor; and what that stage asks of the row.
    """
    begin, scale, code = tl.full((), 0, tl.int32), tl.full((), 1.0, tl.float32), tl.full((), -1, tl.int32)
    highest, best = tl.full((), 0.0, tl.float32), tl.full((), 0, tl.int32)
    number, total = tl.full((), 0, tl.int32), tl.full((), 0.0, tl.float64)
    product, spread = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    going = tl.full((), 1, tl.int32)
    while going > 0:
        passes, code = (begin < split).to(tl.int32), tl.full((), -1, tl.int32)
        while passes > 0:
            code = tl.load(stages + begin)
            moves_nothing_else, factor = moves_nothing_but_scale(code, own)
            passes = moves_nothing_else.to(tl.int32)
            scale *= factor
            begin += passes
            code = tl.where(passes > 0, -1, code)
            passes = tl.where(begin < split, passes, 0)
        is_dynamic = code == DYNATEMP
        wants_sums = ((code == -1) | is_dynamic | (code == TOP_P) | (code == TYP_P)).to(tl.int32)
        wants_spread = (code == TOP_N_SIGMA).to(tl.int32)
        highest, best, number, total, product, spread = measured(line, vocabulary, scale, wants_sums, wants_spread, BLOCK)
        going = tl.full((), 0, tl.int32)
        if is_dynamic & (highest > -float("inf")) & (highest < float("inf")):
            t = dynamic_temperature(own, number, total, product)
            if t > 0:
                scale, begin, going = (scale / tl.maximum(t, COLDEST)).to(tl.float32), begin + 1, going + 1
    return begin, code, scale, highest, best, number, total, product, spread


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
    sums,
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
    gathered = tl.full((), 0, tl.int32)
    tl.store(shares + row, 0.0)
    is_greedy = tl.load(greedy + row) != 0
    begin, code, scale, highest, best, number, total, product, spread = _begun(whole, vocabulary, stages, split, own, BLOCK)
    if (highest == float("inf")) | (highest == -float("inf")):
        # With nothing but -inf, or with +inf or NaN, the first candidate stays alone.
        keep_alone(whole, vocabulary, best, BLOCK)
        return
    if begin == count:
        write_measured(whole, vocabulary, is_greedy, highest, best, scale, total, BLOCK)
        return
    if code >= 0:
        sure = reached_by_all(
            code,
            own,
            highest,
            scale,
            number,
            total,
            product,
            spread,
            maxima + row * groups,
            groups,
            tl.load(lowered + row),
            GROUPS,
        )
        if sure > LOWEST:
            # In memory, so that no register keeps them while stages run.
            tl.store(sums + 2 * row, total)
            tl.store(sums + 2 * row + 1, product)
            number = gather(whole, vocabulary, sure, values + row * CAPACITY, ids + row * CAPACITY, BLOCK, CAPACITY)
            if number <= CAPACITY:
                line, size, gathered = values + row * CAPACITY, number, gathered + 1
    if scale != 1:
        scale_row(line, size, highest, scale, BLOCK)
        highest = tl.full((), 0.0, tl.float32)
    if code == TOP_N_SIGMA:
        keep_within(line, size, highest, -tl.load(own + OWN_SIGMAS) * spread * (1 + SLACK), BLOCK)
    turn, stop, sides = begin + (code == TOP_N_SIGMA).to(tl.int32), tl.full((), 0, tl.int32) + count, tl.full((), 1, tl.int32)
    while turn < stop:
        # Behind the last stage those behind XTC come again, for the coin's other side.
        side, place = line, turn
        if turn >= count:
            side, place = others + row * others_stride, turn - count + split + 1
        code = tl.load(stages + place)
        if code == XTC:
            probability, threshold = tl.load(own + OWN_XTC_PROBABILITY), tl.load(own + OWN_XTC_THRESHOLD)
            least, keeper, tops = tl.full((), 0.0, tl.float32), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
            highest, best = tl.full((), 0.0, tl.float32), tl.full((), 0, tl.int32)
            if (probability > 0) & (threshold <= 0.5):
                highest, best, _number, total, _product, _spread = measured(line, size, 1.0, 1, 0, BLOCK)
                border = threshold * (1 - SLACK) * total
                least, keeper, tops = least_of_top_choices(line, size, highest, border, BLOCK)
            if tops > 1:
                tl.store(shares + row, probability.to(tl.float32))
                if apart > 0:
                    copy_other_side(line, others + row * others_stride, size, least, keeper, BLOCK)
                    stop, sides = stop + count - split - 1, sides + 1
                else:
                    write_shared_sides(
                        line, size, is_greedy, stages, split + 1, count, own, probability, highest, best, least, keeper, BLOCK
                    )
                    stop, sides = stop * 0, sides * 0
        else:
            apply_stage(
                side,
                size,
                code,
                own,
                (turn == begin) & (gathered > 0),
                sums,
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
            if (gathered == 0) & (sides == 1) & (code != TEMPERATURE) & (code != DYNATEMP) & (code != DRY):
                number = gather(whole, vocabulary, LOWEST, values + row * CAPACITY, ids + row * CAPACITY, BLOCK, CAPACITY)
                if number <= CAPACITY:
                    line, size, gathered = values + row * CAPACITY, number, gathered + 1
        turn += 1
    if sides == 2:
        write_copied_sides(line, others + row * others_stride, size, tl.load(own + OWN_XTC_PROBABILITY), is_greedy, BLOCK)
    elif sides == 1:
        write_row(line, size, is_greedy, BLOCK)
    if gathered > 0:
        put_back(whole, vocabulary, values + row * CAPACITY, ids + row * CAPACITY, size, BLOCK)


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
    sums = torch.empty(rows, 2, dtype=torch.float64, device=logits.device)
    xtc = STAGES.index("xtc")
    split = stages.index(xtc) if xtc in stages else len(stages)
    apart = not _BEHIND_XTC.issuperset(stages[split + 1 :])
    few = left is not None and left <= _CAPACITY
    others = values.new_empty(rows, (_CAPACITY if few else vocabulary) if apart else 0)
    tokens, taken_off = penalties or (others.new_empty(rows, 0, dtype=torch.int64), others.new_empty(rows, 0))
    if rows:
        _chain[(rows,)](
            *(logits, logits.stride(0), vocabulary, chosen, greedy, _on(stages, logits.device), split, len(stages)),
            *(numbers.contiguous(), shares, maxima, maxima.shape[1], lowered, sums, values, ids),
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
