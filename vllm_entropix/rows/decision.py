"""A step's decisions on a GPU in one kernel: each row's plan, the token forced at it, and its record.

What the kernel computes stands in PyTorch in ``batch``, ``forcing`` and ``state``. A plan is the sampler's: its rule for
kernels (:class:`~vllm_entropix.samplers.base.KernelRule`) is a function that the kernel calls; without one the kernel reads the
plan that the sampler has made in PyTorch. Rows of both kinds may stand in one batch. The kernel has the rules of all samplers,
whichever are in the batch: no mixture of requests waits for a compiler. A block of rows takes a warp.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.distribution.plan import Parameters, Plan
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.kernels.triton_.sizes import parts
from vllm_entropix.records.fields import COMMON, column, names
from vllm_entropix.rows.forcing import EXCLUDED, INITIAL, Clarification
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import BASE, SequenceTable
from vllm_entropix.samplers.base import KernelRule, Sampler
from vllm_entropix.samplers.observed import VLLM

_BLOCK = 32
# Columns of a record, the slot in front.
_COLUMN = {field.name: tl.constexpr(1 + index) for index, field in enumerate(COMMON)}
_ENTROPY, _VARENTROPY = _COLUMN["entropy"], _COLUMN["varentropy"]
_ATTENTION_ENTROPY, _ATTENTION_VARENTROPY = _COLUMN["attention_entropy"], _COLUMN["attention_varentropy"]
_AGREEMENT, _INTERACTION = _COLUMN["agreement"], _COLUMN["interaction_strength"]
_TEMPERATURE, _TOP_P, _TOP_K, _MIN_P = _COLUMN["temperature"], _COLUMN["top_p"], _COLUMN["top_k"], _COLUMN["min_p"]
_FORCED = _COLUMN["forced"]
_PENDING, _COUNT, _LAST = tl.constexpr(INITIAL[0]), tl.constexpr(INITIAL[2]), tl.constexpr(INITIAL[3])
_FIELDS = tl.constexpr(len(INITIAL))
_EXCLUDED = tl.constexpr(EXCLUDED)
_BASE = tl.constexpr(len(BASE))
_FORCING_RULES = {None: 0, "cooldown": 1, "last-token": 2, "ever": 3}


# Nothing is specialised: no size of a batch compiles a variant.
_WANTED = (
    *("slots", "valid", "sampled", "traced", "samplers", "numbers", "width"),
    *("entropy", "varentropy", "wanted", "rows"),
)


@triton.jit(do_not_specialize=_WANTED)
def _want_attention(
    slots,
    valid,
    sampled,
    traced,
    samplers,
    numbers,
    width,
    entropy,
    varentropy,
    wanted,
    rows,
    rules,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """``rules``: of the samplers that read attention: which rows do; number; first of their numbers."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.minimum(lane, rows - 1)
    slot = tl.load(slots + row)
    h, v, sampler = tl.load(entropy + row), tl.load(varentropy + row), tl.load(samplers + slot)
    reads = tl.full((BLOCK,), 0, tl.int1)
    for which in tl.static_range(len(rules)):
        of_rule = rules[which][0](numbers + slot * width + rules[which][2], h, v)
        reads = reads | ((sampler == rules[which][1]) & of_rule)
    drawn = (tl.load(sampled + slot) != 0) & reads
    wants = (tl.load(valid + row) != 0) & ((tl.load(traced + slot) != 0) | drawn)
    tl.store(wanted + row, wants, mask=lane < rows)


@triton.jit
def _index_in_ring(position, length):
    # 32 bits, since the GPU divides 64 in a function of its own; and a remainder has its dividend's sign.
    return (position.to(tl.int32) % length + length) % length


_ARGUMENTS = (
    *("slots", "positions", "input_ids", "valid", "draft_index", "drafts", "rows", "draft_rows"),
    *(
        "sampled",
        "traced",
        "may_force",
        "prompt_length",
        "samplers",
        "present",
        "first",
        "alone",
        "observed",
        "numbers",
        "width",
        "base",
    ),
    *("given", "given_temperature", "given_top_p", "given_top_k", "given_min_p", "given_samples", "asking"),
    *("logits", "row_stride", "entropy", "varentropy", "log_normaliser", "spread"),
    *("attention", "attention_entropy", "attention_varentropy", "agreement", "interaction", "measured"),
    *("ring_positions", "ring", "ring_length", "token_ids", "tokens", "cooldown", "most"),
    *("after", "vocabulary", "end_ids", "ends", "end_below"),
    *("temperature", "top_p", "top_k", "min_p", "samples", "forced", "written", "records", "record_stride", "tells"),
)


@triton.jit(do_not_specialize=_ARGUMENTS)
def _decide(
    slots,
    positions,
    input_ids,
    valid,
    draft_index,
    drafts,
    rows,
    draft_rows,
    sampled,
    traced,
    may_force,
    prompt_length,
    samplers,
    present,
    first,
    alone,
    observed,
    numbers,
    width,
    base,
    given,
    given_temperature,
    given_top_p,
    given_top_k,
    given_min_p,
    given_samples,
    asking,
    logits,
    row_stride,
    entropy,
    varentropy,
    log_normaliser,
    spread,
    attention,
    attention_entropy,
    attention_varentropy,
    agreement,
    interaction,
    measured,
    ring_positions,
    ring,
    ring_length,
    token_ids,
    tokens,
    cooldown,
    most,
    after,
    vocabulary,
    end_ids,
    ends,
    end_below,
    temperature,
    top_p,
    top_k,
    min_p,
    samples,
    forced,
    written,
    records,
    record_stride,
    tells,
    rules,
    FORCING: tl.constexpr,  # noqa: N803
    PLACED: tl.constexpr,  # noqa: N803
    BOUNDED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """A lane takes the rows of a sequence, which follow one another: what is forced at a draft depends on the row before it.

    ``rules`` are those of all samplers that have one: plan; number; first of their numbers; first column of their own fields.
    The bits of ``present`` say which of them are followed. Rows of samplers that aren't in the batch, which nobody reads, are
    planned as those of its ``first`` sampler. Of samplers without a rule there is no plan (0), a plan ``given`` (1), one that
    says which rows are ``asking``, too (2). ``attention`` was measured of no row (0), of all (1), of those ``measured`` (2).
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    nan = float("nan")
    # The record that the lane wrote last, of which position.
    known = tl.full((BLOCK,), 0, tl.int1)
    previous = tl.full((BLOCK,), 0, tl.int64)
    pending = tl.full((BLOCK,), 0, tl.int64)
    was_forced = tl.full((BLOCK,), 0, tl.int64)
    count = tl.full((BLOCK,), 0, tl.int64)
    last = tl.full((BLOCK,), 0, tl.int64)
    seen = tl.full((BLOCK,), 0, tl.int64)
    for draft in tl.range(draft_rows):
        # Lanes beyond the end read the last row, and write nothing.
        row = tl.minimum(lane + draft, rows - 1).to(tl.int64)
        mine = (lane + draft < rows) & (tl.load(draft_index + row, mask=row < drafts, other=0) == draft)
        slot = tl.load(slots + row)
        counts = tl.load(valid + row) != 0
        drawn = tl.load(sampled + slot) != 0
        told = ((tells > 0) & (tl.load(traced + slot) != 0)) | ((tells > 1) & drawn)
        h, v, sigma = tl.load(entropy + row), tl.load(varentropy + row), tl.load(spread + row)
        attended = (attention == 1) | ((attention == 2) & (tl.load(measured + row) != 0))
        ae = tl.where(attended, tl.load(attention_entropy + row), 0.0)
        av = tl.where(attended, tl.load(attention_varentropy + row), 0.0)
        ag = tl.where(attended, tl.load(agreement + row), 0.0)
        strength = tl.where(attended, tl.load(interaction + row), 0.0)

        record = records + row * record_stride
        # Rows that nothing is told of have slot 0, and a record all the same.
        keeps = mine & (tells > 0)
        # What nobody tells, such as another sampler's field, is null.
        for index in tl.range(record_stride):
            tl.store(record + index, nan, mask=keeps)
        sampler = tl.load(samplers + slot)
        planner = tl.where(alone != 0, first, sampler)
        t, p, m = tl.load(given_temperature + row), tl.load(given_top_p + row), tl.load(given_min_p + row)
        k, n = tl.load(given_top_k + row), tl.load(given_samples + row)
        asks = (given == 2) & (tl.load(asking + row) != 0)
        for which in tl.static_range(len(rules)):
            number, own = rules[which][1], rules[which][3]
            planned = (planner == number) & (((present >> which) & 1) != 0)
            tr, pr, kr, mr, nr, ar = rules[which][0](
                numbers + slot * width + rules[which][2],
                base + slot * _BASE,
                h,
                v,
                sigma,
                attended,
                ae,
                av,
                ag,
                strength,
                record + own,
                keeps & planned,
            )
            by_rule = planned | (first == number)
            t, p, m = tl.where(by_rule, tr, t), tl.where(by_rule, pr, p), tl.where(by_rule, mr, m)
            k, n = tl.where(by_rule, kr.to(tl.int64), k), tl.where(by_rule, nr.to(tl.int64), n)
            asks = tl.where(by_rule, ar, asks)
        tl.store(temperature + row, t, mask=mine)
        tl.store(top_p + row, p, mask=mine)
        tl.store(top_k + row, k, mask=mine)
        tl.store(min_p + row, m, mask=mine)
        tl.store(samples + row, n, mask=mine)
        tl.store(written + row, drawn, mask=mine)

        token = tl.full((BLOCK,), -1, tl.int64)
        if FORCING:
            position, fed = tl.load(positions + row).to(tl.int64), tl.load(input_ids + row).to(tl.int64)
            before = position - 1
            index = _index_in_ring(before, ring_length)
            remembered = ring + (slot * ring_length + index) * _FIELDS
            there = tl.load(ring_positions + slot * ring_length + index).to(tl.int64) == before
            # What this lane has just written it may not read back.
            carried = known & (previous == before)
            pending = tl.where(carried, pending, tl.where(there, tl.load(remembered), _PENDING).to(tl.int64))
            was_forced = tl.where(carried, was_forced, tl.where(there, tl.load(remembered + 1), 0).to(tl.int64))
            count = tl.where(carried, count, tl.where(there, tl.load(remembered + 2), _COUNT).to(tl.int64))
            last = tl.where(carried, last, tl.where(there, tl.load(remembered + 3), _LAST).to(tl.int64))
            seen = tl.where(carried, seen, tl.where(there, tl.load(remembered + 4), 0).to(tl.int64))

            placed = (was_forced > 0) & (fed == tl.load(token_ids + tl.maximum(pending, 0)))
            count += (placed & (pending == 0)).to(tl.int64)
            last = tl.where(placed, position, last)
            pending = tl.where(placed, pending + 1, pending)
            pending = tl.where(pending >= tokens, -1, pending)
            generated = position >= tl.load(prompt_length + slot)
            is_last = generated & (fed == tl.load(token_ids + tokens - 1))
            seen = (seen > 0).to(tl.int64) | is_last.to(tl.int64)
            if FORCING == 1:
                eligible = (position - last >= cooldown) & (count < most)
            elif FORCING == 2:
                eligible = is_last == 0
            else:
                eligible = seen == 0
            if PLACED:
                before_it = tl.minimum(tl.maximum(fed, 0), vocabulary - 1)
                eligible = eligible & (tl.load(after + before_it) != 0)
            if BOUNDED:
                end = tl.full((BLOCK,), -float("inf"), tl.float32)
                for which in tl.range(ends):
                    end = tl.maximum(end, tl.load(logits + row * row_stride + tl.load(end_ids + which)))
                eligible = eligible & (end - tl.load(log_normaliser + row) < end_below)
            may = drawn & (tl.load(may_force + slot) != 0)
            pending = tl.where(asks & may & eligible & (pending < 0), 0, pending)
            next_token = tl.load(token_ids + tl.maximum(pending, 0))
            logit = tl.load(logits + row * row_stride + next_token)
            allowed = logit - tl.load(log_normaliser + row) > _EXCLUDED
            forces = may & (pending >= 0) & allowed
            was_forced = forces.to(tl.int64)

            # What isn't used leaves its trace with nobody.
            uses = mine & counts
            index = _index_in_ring(position, ring_length)
            tl.store(ring_positions + slot * ring_length + index, position.to(tl.int32), mask=uses)
            remembered = ring + (slot * ring_length + index) * _FIELDS
            tl.store(remembered, pending.to(tl.int32), mask=uses)
            tl.store(remembered + 1, was_forced.to(tl.int32), mask=uses)
            tl.store(remembered + 2, count.to(tl.int32), mask=uses)
            tl.store(remembered + 3, last.to(tl.int32), mask=uses)
            tl.store(remembered + 4, seen.to(tl.int32), mask=uses)
            known, previous = uses, position
            token = tl.where(forces & counts, next_token, -1)
        tl.store(forced + row, token, mask=mine)

        # A greedy row's parameters are those of argmax; what vLLM draws has the request's own.
        of_plan = drawn | ((sampler == observed) & (t > 0))
        tl.store(record, tl.where(told & counts, slot, 0).to(tl.float32), mask=keeps)
        tl.store(record + _ENTROPY, h, mask=keeps)
        tl.store(record + _VARENTROPY, v, mask=keeps)
        tl.store(record + _ATTENTION_ENTROPY, tl.where(attended, ae, nan), mask=keeps)
        tl.store(record + _ATTENTION_VARENTROPY, tl.where(attended, av, nan), mask=keeps)
        tl.store(record + _AGREEMENT, tl.where(attended, ag, nan), mask=keeps)
        tl.store(record + _INTERACTION, tl.where(attended, strength, nan), mask=keeps)
        tl.store(record + _TEMPERATURE, tl.where(of_plan, t, 0.0), mask=keeps)
        tl.store(record + _TOP_P, tl.where(of_plan, p, 1.0), mask=keeps)
        tl.store(record + _TOP_K, tl.where(of_plan, k, 1).to(tl.float32), mask=keeps)
        tl.store(record + _MIN_P, tl.where(of_plan, m, 0.0), mask=keeps)
        tl.store(record + _FORCED, (token >= 0).to(tl.float32), mask=keeps)


def rows_that_want_attention(
    rules: Mapping[str, KernelRule], table: SequenceTable, rows: Rows, metrics: LogitsMetrics
) -> Tensor:
    """bool ``[rows]``: rows of samplers whose plan reads attention, and all that are traced.

    Args:
        rules: of all samplers that have one, by name.
        table: of the sequences.
        rows: of the step.
        metrics: of their logits.
    """
    wanted = torch.empty_like(rows.valid)
    count = len(rows.slots)
    _want_attention[(parts(count, _BLOCK),)](
        rows.slots,
        rows.valid,
        table.device_sampled,
        table.device_traced,
        table.device_sampler,
        table.device_numbers,
        table.device_numbers.stride(0),
        metrics.entropy,
        metrics.varentropy,
        wanted,
        count,
        tuple(
            (rule.reads_attention, table.number[name], table.blocks[name].start)
            for name, rule in rules.items()
            if rule.reads_attention is not None
        ),
        _BLOCK,
        num_warps=1,
    )
    return wanted


def decide(
    rules: Mapping[str, KernelRule],
    present: Sequence[str],
    plan: Plan | None,
    table: SequenceTable,
    rows: Rows,
    logits: Tensor,
    metrics: LogitsMetrics,
    spread: Tensor | None,
    attention: AttentionStatistics | None,
    clarification: Clarification | None,
    traced: bool,
    counted: bool,
) -> tuple[Parameters, Tensor, Tensor, Tensor | None]:
    """Plan rows of samplers that have a rule, force tokens, and make records, in one launch.

    Args:
        rules: of all samplers that have one, by name, whether they are in the batch or not.
        present: names of the samplers that are.
        plan: of all other rows; None: there are none.
        table: of the sequences.
        rows: of the step; those of a sequence follow one another.
        logits: float32 ``[rows, vocab]``, masked.
        metrics: of the logits.
        spread: of the logits; None: no rule that is followed reads it.
        attention: of the rows; None if none was measured.
        clarification: what may be forced, and what is remembered of it.
        traced: make records of traced rows.
        counted: make records of all sampled rows, too.

    Returns:
        Parameters; the token forced at each row; which rows are sampled; records. As of :class:`Decisions`.
    """
    count, device = len(rows.slots), logits.device
    temperature, top_p, min_p = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(3))
    top_k, samples, forced = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(3))
    written = torch.empty(count, dtype=torch.bool, device=device)
    columns = 1 + len(names())
    tells = traced or counted
    records = torch.empty(count if tells else 0, columns, dtype=torch.float32, device=device)
    ring = None if clarification is None else clarification.state
    bounded = clarification is not None and clarification.end_below < math.inf
    # Where there is nothing to point to, the kernel looks at nothing; of the same type, so that it is the same kernel.
    nothing, numbers = written, metrics.entropy
    given = Parameters(numbers, numbers, rows.slots, numbers, rows.slots) if plan is None else plan.parameters.packed()
    attended = AttentionStatistics(numbers, numbers, numbers, numbers) if attention is None else attention
    _decide[(parts(count, _BLOCK),)](
        rows.slots,
        rows.positions,
        rows.input_ids,
        rows.valid,
        torch.empty(0, dtype=torch.int32, device=device) if rows.draft_index is None else rows.draft_index,
        0 if rows.draft_index is None else count,
        count,
        rows.draft_rows,
        table.device_sampled,
        table.device_traced,
        table.device_allow_clarification,
        table.device_prompt_length,
        table.device_sampler,
        sum((name in present) << index for index, name in enumerate(rules)),
        table.number[present[0]] if plan is None else -1,
        int(len(present) == 1),
        table.number[VLLM] if VLLM in present else -1,
        table.device_numbers,
        table.device_numbers.stride(0),
        table.device_base,
        0 if plan is None else 1 if plan.forces is None else 2,
        *(given.temperature, given.top_p, given.top_k, given.min_p, given.samples),
        rows.valid if plan is None or plan.forces is None else plan.forces.contiguous(),
        logits,
        logits.stride(0),
        metrics.entropy,
        metrics.varentropy,
        metrics.log_normaliser,
        numbers if spread is None else spread,
        0 if attention is None else 1 if attention.measured is None else 2,
        attended.attention_entropy,
        attended.attention_varentropy,
        attended.agreement,
        attended.interaction_strength,
        rows.valid if attended.measured is None else attended.measured,
        nothing if ring is None else ring.positions,
        nothing if ring is None else ring.records,
        1 if ring is None else ring.length,
        nothing if clarification is None else clarification.token_ids,
        0 if clarification is None else clarification.length,
        0 if clarification is None else clarification.cooldown,
        0 if clarification is None else clarification.max_per_request,
        nothing if clarification is None or clarification.after is None else clarification.after,
        0 if clarification is None or clarification.after is None else len(clarification.after),
        nothing if clarification is None else clarification.ends,
        0 if clarification is None else len(clarification.ends),
        math.inf if clarification is None else clarification.end_below,
        temperature,
        top_p,
        top_k,
        min_p,
        samples,
        forced,
        written,
        records,
        columns,
        2 if counted else int(traced),
        tuple(
            (rule.plan, table.number[name], table.blocks[name].start, _first_field(table.samplers[name]))
            for name, rule in rules.items()
        ),
        FORCING=_FORCING_RULES[None if clarification is None else clarification.rule],
        PLACED=clarification is not None and clarification.after is not None,
        BOUNDED=bounded,
        BLOCK=_BLOCK,
        num_warps=1,
        # As PyTorch computes: no product is added before it is rounded.
        enable_fp_fusion=False,
    )
    if plan is not None and tells:
        for field, values in plan.fields.items():
            index = column(field)
            if index is not None:
                records[:, 1 + index] = values
    return Parameters(temperature, top_p, top_k, min_p, samples), forced, written, records if tells else None


def _first_field(sampler: Sampler) -> int:
    """The column of a record in which the sampler's own fields begin; 0, which is the slot's, if it has none."""
    index = column(sampler.fields[0].name) if sampler.fields else None
    return 0 if index is None else 1 + index
