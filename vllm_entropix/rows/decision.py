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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

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
# Row counts whose parts of the decisions' memory are kept: finding them again takes no operation.
_SIZES = 64
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


@dataclass(frozen=True)
class _Present:
    """What the kernel is told of the samplers in a batch.

    Attributes:
        rules: of all samplers that have one, as :func:`_decide` takes them.
        followed: its bits say which of them are in the batch.
        first: number of the batch's first sampler.
        alone: is it the only one?
        observed: number of the sampler whose rows vLLM draws, or -1.
        columns: of a record, the slot in front.
    """

    rules: tuple[tuple[Any, int, int, int], ...]
    followed: int
    first: int
    alone: int
    observed: int
    columns: int


@dataclass(frozen=True)
class _Outputs:
    """What is decided of so many rows, but for their records."""

    parameters: Parameters
    forced: Tensor
    written: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> _Outputs:
        """Memory for rows, each number's for itself: kernels that are told its address find it aligned."""
        temperature, top_p, min_p = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
        top_k, samples, forced = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(3))
        written = torch.empty(rows, dtype=torch.bool, device=device)
        return cls(Parameters(temperature, top_p, top_k, min_p, samples), forced, written)

    def first(self, rows: int) -> _Outputs:
        """Those of the first rows."""
        p = self.parameters
        numbers = (number[:rows] for number in (p.temperature, p.top_p, p.top_k, p.min_p, p.samples))
        return _Outputs(Parameters(*numbers), self.forced[:rows], self.written[:rows])


class Decider:
    """Decides for the rows of steps, with what stays the same from step to step made once: a step waits for its host, too.

    Args:
        rules: of all samplers that have one, by name, whether they are in a batch or not.
        table: of the sequences.
        clarification: what may be forced, and what is remembered of it; None: nothing.
        counted: make records of all sampled rows, too.
    """

    def __init__(
        self, rules: Mapping[str, KernelRule], table: SequenceTable, clarification: Clarification | None, counted: bool
    ) -> None:
        self._rules, self._table, self._clarification, self._counted = rules, table, clarification, counted
        self._reading = tuple(
            (rule.reads_attention, table.number[name], table.blocks[name].start)
            for name, rule in rules.items()
            if rule.reads_attention is not None
        )
        # By the names of the samplers in a batch and of a record's fields, whose columns the kernel is told.
        self._present: dict[tuple[tuple[str, ...], tuple[str, ...]], _Present] = {}
        self._no_drafts = torch.empty(0, dtype=torch.int32, device=table.device)
        self.reserve(0)

    def reserve(self, rows: int) -> None:
        """Allocate what is decided of so many rows."""
        self._rows, self._outputs = rows, _Outputs.of(rows, self._table.device)
        self._first = lru_cache(_SIZES)(self._outputs.first)

    def _outputs_of(self, rows: int) -> _Outputs:
        """Where a call's decisions go, as long as no other call is made.

        Nothing outlives that: the kernels of the same stream that write the distributions are all that reads them, and they are
        launched before the next call's. The host, a copy on its way and what waits for the draw are given records and masks
        of their own.
        """
        if rows > self._rows:
            self.reserve(rows)
        return self._first(rows)

    def _of_batch(self, present: tuple[str, ...], fields: tuple[str, ...]) -> _Present:
        known = self._present.get((present, fields))
        if known is not None:
            return known
        table, rules = self._table, self._rules
        found = self._present[present, fields] = _Present(
            tuple(
                (rule.plan, table.number[name], table.blocks[name].start, _first_field(table.samplers[name]))
                for name, rule in rules.items()
            ),
            sum((name in present) << index for index, name in enumerate(rules)),
            table.number[present[0]],
            int(len(present) == 1),
            table.number[VLLM] if VLLM in present else -1,
            1 + len(fields),
        )
        return found

    def rows_that_want_attention(self, rows: Rows, metrics: LogitsMetrics) -> Tensor:
        """bool ``[rows]``: rows of samplers whose plan reads attention, and all that are traced.

        Args:
            rows: of the step.
            metrics: of their logits.
        """
        table = self._table
        wanted = torch.empty_like(rows.valid)
        count = rows.slots.shape[0]
        _want_attention[(parts(count, _BLOCK),)](
            rows.slots,
            rows.valid,
            table.device_sampled,
            table.device_traced,
            table.device_sampler,
            table.device_numbers,
            table.width,
            metrics.entropy,
            metrics.varentropy,
            wanted,
            count,
            self._reading,
            _BLOCK,
            num_warps=1,
        )
        return wanted

    def decide(
        self,
        present: tuple[str, ...],
        plan: Plan | None,
        rows: Rows,
        logits: Tensor,
        metrics: LogitsMetrics,
        spread: Tensor | None,
        attention: AttentionStatistics | None,
        traced: bool,
    ) -> tuple[Parameters, Tensor, Tensor, Tensor | None]:
        """Plan rows of samplers that have a rule, force tokens, and make records, in one launch.

        Args:
            present: names of the samplers that are in the batch.
            plan: of all rows whose sampler has no rule; None: there are none.
            rows: of the step; those of a sequence follow one another.
            logits: float32 ``[rows, vocab]``, masked.
            metrics: of the logits.
            spread: of the logits; None: no rule that is followed reads it.
            attention: of the rows; None if none was measured.
            traced: make records of traced rows.

        Returns:
            Parameters; the token forced at each row; which rows are sampled; records. As of :class:`Decisions`. All but the
            records stand where the next call puts its own.
        """
        table, clarification = self._table, self._clarification
        count, stride = logits.shape[0], logits.stride(0)
        of_batch, outputs = self._of_batch(present, names()), self._outputs_of(count)
        p, forced, written = outputs.parameters, outputs.forced, outputs.written
        tells = traced or self._counted
        records = metrics.entropy
        if tells:
            records = torch.empty(count, of_batch.columns, dtype=torch.float32, device=logits.device)
        ring = None if clarification is None else clarification.state
        # Where there is nothing to point to, the kernel looks at nothing; of the same type, so that it is the same kernel.
        nothing, numbers, valid = written, metrics.entropy, rows.valid
        given = Parameters(numbers, numbers, rows.slots, numbers, rows.slots) if plan is None else plan.parameters.packed()
        _decide[(parts(count, _BLOCK),)](
            rows.slots,
            rows.positions,
            rows.input_ids,
            valid,
            self._no_drafts if rows.draft_index is None else rows.draft_index,
            0 if rows.draft_index is None else count,
            count,
            rows.draft_rows,
            table.device_sampled,
            table.device_traced,
            table.device_allow_clarification,
            table.device_prompt_length,
            table.device_sampler,
            of_batch.followed,
            of_batch.first if plan is None else -1,
            of_batch.alone,
            of_batch.observed,
            table.device_numbers,
            table.width,
            table.device_base,
            0 if plan is None else 1 if plan.forces is None else 2,
            *(given.temperature, given.top_p, given.top_k, given.min_p, given.samples),
            valid if plan is None or plan.forces is None else plan.forces.contiguous(),
            logits,
            stride,
            metrics.entropy,
            metrics.varentropy,
            metrics.log_normaliser,
            numbers if spread is None else spread,
            0 if attention is None else 1 if attention.measured is None else 2,
            numbers if attention is None else attention.attention_entropy,
            numbers if attention is None else attention.attention_varentropy,
            numbers if attention is None else attention.agreement,
            numbers if attention is None else attention.interaction_strength,
            valid if attention is None or attention.measured is None else attention.measured,
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
            *(p.temperature, p.top_p, p.top_k, p.min_p, p.samples),
            forced,
            written,
            records,
            of_batch.columns,
            2 if self._counted else int(traced),
            of_batch.rules,
            FORCING=_FORCING_RULES[None if clarification is None else clarification.rule],
            PLACED=clarification is not None and clarification.after is not None,
            BOUNDED=clarification is not None and clarification.end_below < math.inf,
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
        return p, forced, written, records if tells else None


def _first_field(sampler: Sampler) -> int:
    """The column of a record in which the sampler's own fields begin; 0, which is the slot's, if it has none."""
    index = column(sampler.fields[0].name) if sampler.fields else None
    return 0 if index is None else 1 + index
