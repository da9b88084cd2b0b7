"""The batch's samplers at work: a batch's logits become the distributions of the engine's draw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.distribution.attention import AttentionStatistics, joined
from vllm_entropix.distribution.backend import Backend, Draws, backend_for
from vllm_entropix.distribution.plan import Drawn, Parameters, Plan
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.records.fields import column, names
from vllm_entropix.rows.forcing import ANYWHERE, Clarification, Places
from vllm_entropix.rows.rows import Decisions, Measure, Rows
from vllm_entropix.rows.state import PositionRing
from vllm_entropix.rows.table import Composition, Sequence, SequenceTable, to_device
from vllm_entropix.rows.text import RowText
from vllm_entropix.rows.undrawn import Undrawn
from vllm_entropix.samplers.base import KernelRule, RowView, Sampler, Sequences
from vllm_entropix.samplers.observed import VLLM
from vllm_entropix.samplers.registry import instances_and_observed, sampler_of
from vllm_entropix.samplers.request import RequestSettings

if TYPE_CHECKING:
    from vllm_entropix.rows.decision import Decider
    from vllm_entropix.samplers.entropix.settings import EntropixConfig
    from vllm_entropix.settings.rules import Fidelity

# A bool mask [rows] of those whose attention is wanted → their statistics, or None if there are none to be had.
Attention = Callable[[Tensor], AttentionStatistics | None]


class BatchSampler:
    """Lets each row's sampler plan its distribution, writes it, and leaves all other rows untouched.

    Args:
        config: the server's configuration.
        slots: room for this many sequences at first (it grows).
        clarification: ids of the clarification, or None if none is ever forced.
        device: of the logits.
        draft_tokens: drafts verified in one step at most.
        counted: make records of all sampled rows, and not only of traced ones.
        places: where the clarification may begin.
    """

    def __init__(
        self,
        config: EntropixConfig,
        slots: int,
        clarification: tuple[int, ...] | None,
        device: torch.device | str,
        draft_tokens: int = 0,
        counted: bool = False,
        places: Places = ANYWHERE,
    ) -> None:
        self.counted = counted
        self.alternatives = config.trace.alternatives
        # Engines hand in float32, which the kernels take.
        self.backend, self.other_types = backend_for(device), Backend(device)
        self.samplers = instances_and_observed(config)
        self._rules = cache(partial(_rules, self.samplers))
        self._deciders: dict[str, Decider] = {}  # by the backend's name
        self.sequences = SequenceTable(self.samplers, sampler_of(RequestSettings(), config), slots + 1, device)
        self.clarification = (
            None if clarification is None else Clarification(clarification, config, slots + 1, draft_tokens, device, places)
        )
        # The number that a sampler keeps by position; NaN stands where none is known.
        self.state = PositionRing((float("nan"),), torch.float64, slots + 1, draft_tokens, device)
        # float32, one dimension each: memory that nobody else needs from where attention was measured until the step's tokens
        # are drawn. None may be lent where a step's rows come in several calls of `apply`: the second measures again.
        self.lent: tuple[Tensor, ...] = ()
        self._waiting: list[_Waiting] = []

    def reserve(self, rows: int, vocabulary: int) -> None:
        """Allocate now what steps of at most so many rows need, before the engine measures how much memory is left for keys."""
        self.backend.reserve(rows, vocabulary, self.sequences.device)
        if self.backend.decides:
            self._decider(self.backend.name).reserve(rows)

    def _decider(self, backend: str) -> Decider:
        if backend not in self._deciders:
            from vllm_entropix.rows.decision import Decider

            self._deciders[backend] = Decider(self._rules(backend), self.sequences, self.clarification, self.counted)
        return self._deciders[backend]

    def add(self, request_id: str, sequence: Sequence) -> None:
        """A sequence begins; one that is known already (resumed after a preemption) keeps what is remembered of it."""
        begins = request_id not in self.sequences
        slot = self.sequences.add(request_id, sequence)
        if not begins:
            return
        begin = 0
        for ring in self._rings:
            if self.sequences.slots > ring.slots:
                ring.grow(self.sequences.slots)
            if sequence.state is None:
                ring.forget(slot)
            else:
                ring.from_bytes(slot, sequence.state[begin : begin + ring.nbytes])
                begin += ring.nbytes
        if sequence.state is not None:
            # The token that it parts with wasn't drawn, so it moves no number, as one that a sampler excluded doesn't.
            self.state.repeat(slot, sequence.parted)

    @property
    def _rings(self) -> tuple[PositionRing, ...]:
        """Where sequences are remembered, in a fixed order."""
        return (self.state,) if self.clarification is None else (self.state, self.clarification.state)

    def states(self, slots: Tensor) -> Tensor:
        """What is remembered of sequences, for those that part from them (:attr:`Sequence.state`): uint8 ``[rows, bytes]``.

        Args:
            slots: int64 ``[rows]``.
        """
        return torch.cat([ring.as_bytes(slots) for ring in self._rings], dim=1)

    def begin_step(self) -> None:
        """What was written before is drawn by now, or never will be."""
        self._waiting.clear()
        self.sequences.flush()

    @property
    def follows_draws(self) -> bool:
        """May any running sequence's sampler ask what was drawn, or its record tell of it?"""
        everybody = self.sequences.composition(np.arange(self.sequences.slots))
        return everybody.any_traced or any(self.samplers[name].follows_draws for name in everybody.samplers)

    def remove(self, request_id: str) -> None:
        """A sequence has ended."""
        self.sequences.remove(request_id)

    def warm_up(self, vocabulary: int, ranks: int) -> None:
        """Run a step of a traced row that belongs to nobody, which compiles the kernels that steps run.

        Args:
            vocabulary: the model's.
            ranks: how many draw the same tokens.
        """
        name, device = "nobody", self.sequences.device
        constants = [value for _, value in self.samplers[self.sequences.default].numbers()]
        self.add(name, Sequence(constants, sampled=True, traced=True, allow_clarification=False, prompt_length=0))
        self.sequences.flush()
        slots = self.sequences.slots_of([name], 1)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        text = RowText(zero.new_zeros(1, 2), zero, zero + 1, zero, zero, zero, longest=2)
        rows = Rows(torch.from_numpy(slots).to(device), slots, zero, zero, zero == 0, zero, text=text)
        self.apply(torch.zeros(1, vocabulary, device=device), rows, None)
        self._waiting.clear()
        self.remove(name)
        for sampler in self.samplers.values():
            sampler.started(ranks)

    def apply(self, logits: Tensor, rows: Rows, measure: Measure | None) -> Tensor | None:
        """Write each sampled row's final distribution into ``logits`` as log-probabilities.

        Args:
            logits: float32 ``[rows, vocab]``, masked and penalised; changed in place.
            rows: whose rows they are.
            measure: gives attention statistics; None runs on the logits alone.

        Returns:
            float32 ``[rows, columns]``, or None if nothing is to be told: slot, record, alternatives
            (see ``records.fields.all_fields``).
        """
        table = self.sequences
        present = table.composition(rows.host_slots)
        if not present.any_concerned:
            return None
        if present.all_concerned or not self.backend.asks_device:
            return self._apply(logits, rows, measure, present, present.all_sampled)
        # It pays to work on the rows concerned only, where asking for their indices costs nothing.
        index = (table.device_sampled[rows.slots] | table.device_traced[rows.slots]).nonzero().flatten()
        chosen = logits[index]
        records = self._apply(chosen, rows.select(index), measure, present, everywhere=False)
        logits[index] = chosen
        return records

    def _apply(
        self, logits: Tensor, rows: Rows, measure: Measure | None, present: Composition, everywhere: bool
    ) -> Tensor | None:
        backend = self.backend if logits.dtype == torch.float32 else self.other_types
        statistics = backend.statistics(logits, reserved=True)
        decide = self._decide_by_kernel if backend.decides else self._decide
        decided = decide(backend, present.samplers, logits, statistics, rows, measure, present.any_traced)
        alternatives, after_draw = None, decided.after_draw
        if present.any_traced:
            assert decided.records is not None
            alternatives = self._alternatives(backend, logits, statistics, rows, decided.records)
            undrawn = self._keep(logits, statistics, rows)
            after_draw = (*after_draw, (self.sequences.device_traced[rows.slots], undrawn))
        for whole, write in decided.whole:
            write(logits, whole)
        # Where none is sampled, vLLM draws all of them.
        for order, written in decided.written.items() if present.any_sampled else ():
            draws = Draws(
                decided.parameters,
                order,
                decided.forced,
                written,
                statistics.log_normaliser,
                present.most_candidates,
                present.most_drawn,
                everywhere and len(decided.written) == 1 and not decided.whole,
                statistics.maxima,
                [whole for whole, _ in decided.whole],
            )
            backend.write(logits, draws)
        records = decided.records
        if records is not None and alternatives is not None:
            records = torch.cat((records, *(block.to(torch.float32) for block in alternatives)), dim=-1)
        if after_draw:
            self._waiting.append(_Waiting(rows, after_draw, records))
        return records

    @property
    def waits_for_draw(self) -> bool:
        """Does anything depend on what is drawn from the distributions that were written last?"""
        return bool(self._waiting)

    def drawn(self, token_ids: Tensor, number: Tensor | None = None) -> None:
        """Tell what was drawn from the distributions that were written since the last call: states and records follow it.

        Args:
            token_ids: integers ``[requests, tokens]``, of each request of the batch that the model ran.
            number: ``[requests]``, how many of them were drawn; None: one each.
        """
        waiting, self._waiting = self._waiting, []
        for part in waiting:
            rows = part.rows
            tokens, kept = rows.drawn(token_ids).long(), rows.valid
            if number is not None:
                kept = kept & ((0 if rows.draft_index is None else rows.draft_index) < number[rows.batch])
            for concerned, after_draw in part.after_draw:
                told = concerned & kept
                # What stands where nothing was drawn may be memory that nobody wrote.
                found = after_draw(tokens.where(told, 0))
                if found.state is not None:
                    known = told & ~found.state.isnan()
                    self.state.write(rows.slots, rows.positions, found.state.unsqueeze(-1), known)
                if part.records is not None:
                    _tell(part.records, found, told)

    def _keep(self, logits: Tensor, statistics: LogitsMetrics, rows: Rows) -> Undrawn:
        """The traced rows' logits, for what is told of the token that will be drawn from them."""
        index = None
        # The host doesn't know which rows are traced ones where a sequence has several, or where some were selected.
        known = rows.draft_index is None and len(rows.host_slots) == len(logits)
        if known and not self.sequences.composition(rows.host_slots).all_traced:
            index = to_device(np.flatnonzero(self.sequences.traced[rows.host_slots]), logits.device)
        return Undrawn.of(logits, statistics.log_normaliser, index, self.lent)

    def _decide_by_kernel(
        self,
        backend: Backend,
        present: tuple[str, ...],
        logits: Tensor,
        statistics: LogitsMetrics,
        rows: Rows,
        measure: Measure | None,
        tracing: bool,
    ) -> Decisions:
        """What :meth:`_decide` does, in a kernel: it follows samplers' rules, and reads the plans of those without one."""
        table, rules, decider = self.sequences, self._rules(backend.name), self._decider(backend.name)
        ruled = [rules[name] for name in present if name in rules]
        others = [name for name in present if name not in rules]
        plan: Plan | None = None
        plans: list[tuple[Tensor, Plan]] = []
        if others:
            alone = len(present) == 1
            attention = _attention(rows, measure, lambda: (table.device_sampled[rows.slots], table.device_traced[rows.slots]))
            plans = self._plans(backend, others, logits, statistics, rows, attention, alone)
            plan = _mixed(plans, alone)
        measured = None if plan is None else plan.attention
        read = any(rule.reads_attention is not None for rule in ruled)
        if measure is not None and (read or (tracing and measured is None)):
            theirs, measured = measured, measure(rows, decider.rows_that_want_attention(rows, statistics))
            if measured is not None and theirs is not None:
                # What another sampler's plan looked at.
                looked = torch.stack([mine for mine, one in plans if one.attention is not None]).any(dim=0)
                measured = measured.overlaid(looked, theirs)
        spread = backend.spread(logits) if any(rule.reads_spread for rule in ruled) else None
        parameters, forced, sampled, records = decider.decide(
            present, plan, rows, logits, statistics, spread, measured, tracing
        )
        orders = {name: rules[name].order for name in present if name in rules}
        orders |= {name: one.order for name, (_, one) in zip(others, plans, strict=True)}
        written = {orders[present[0]]: sampled}
        if len(set(orders.values())) > 1:
            samplers = table.device_sampler[rows.slots]
            written = _by_order(sampled, [(samplers == table.number[name], order) for name, order in orders.items()])
        return _with_distributions(Decisions(parameters, forced, written, records), plans, sampled, len(present))

    def _decide(
        self,
        backend: Backend,
        present: tuple[str, ...],
        logits: Tensor,
        statistics: LogitsMetrics,
        rows: Rows,
        measure: Measure | None,
        tracing: bool,
    ) -> Decisions:
        table = self.sequences
        sampled = table.device_sampled.index_select(0, rows.slots)
        attention = _attention(rows, measure, lambda: (sampled, table.device_traced.index_select(0, rows.slots)))
        alone = len(present) == 1
        plans = self._plans(backend, present, logits, statistics, rows, attention, alone)
        plan = _mixed(plans, alone)
        measured = plan.attention
        if measured is None and tracing:
            measured = attention(torch.zeros_like(sampled))
        forced = self._force(logits, rows, plan, statistics, sampled)
        written = _by_order(sampled, [(mine, one.order) for mine, one in plans])
        records = None
        if tracing or self.counted:
            traced = table.device_traced.index_select(0, rows.slots)
            told = (traced | sampled) if self.counted else traced
            slots = torch.where(told & rows.valid, rows.slots, 0)
            # What vLLM draws has the request's own parameters, and those of argmax if that is how it draws.
            argmax = ~sampled
            if VLLM in present:
                observed = table.device_sampler[rows.slots] == table.number[VLLM]
                argmax = argmax & ~(observed & (plan.parameters.temperature > 0))
            records = _records(plan, statistics, measured, forced, argmax, slots, self.backend.asks_device)
        return _with_distributions(Decisions(plan.parameters, forced, written, records), plans, sampled, len(present))

    def _plans(
        self,
        backend: Backend,
        present: Collection[str],
        logits: Tensor,
        statistics: LogitsMetrics,
        rows: Rows,
        attention: Attention,
        alone: bool,
    ) -> list[tuple[Tensor, Plan]]:
        """(bool ``[rows]``: its rows, plan) of each sampler that is ``present`` in the batch; ``alone``: there is no other.

        Each plan covers all rows, since which rows are whose is known on the device only.
        """
        table, plans = self.sequences, []
        base: Callable[[], Parameters] = partial(table.base_of_rows, rows.slots)
        if len(present) > 1:
            base = cache(base)  # what samplers share is mixed at no cost
        for name in present:
            mine = rows.valid if alone else table.device_sampler[rows.slots] == table.number[name]
            measure = attention if alone else partial(_of_mine, attention, mine)
            settings = table.of_rows(name, rows.slots)
            view = RowView(
                *(logits, statistics, settings, backend, base, measure),
                mine=None if alone else mine,
                sequences=self._sequences(name, rows),
            )
            plans.append((mine, self.samplers[name].plan(view)))
        return plans

    def _sequences(self, name: str, rows: Rows) -> Sequences:
        """What a sampler may look at of its rows' sequences."""
        table = self.sequences
        return Sequences(
            host_numbers=partial(table.host_numbers, name, rows.host_slots),
            input_ids=rows.input_ids,
            state=lambda: self.state.read(rows.slots, rows.positions - 1).squeeze(-1),
            text=None if rows.text is None else rows.text.last,
            draft_index=rows.draft_index,
            draft_rows=rows.draft_rows,
        )

    def _force(self, logits: Tensor, rows: Rows, plan: Plan, statistics: LogitsMetrics, sampled: Tensor) -> Tensor:
        """int64 ``[rows]``: the token forced at each row, -1 for none."""
        forced = torch.full_like(rows.slots, -1)
        if self.clarification is None:
            return forced
        table = self.sequences
        may = sampled & table.device_allow_clarification[rows.slots]
        generated = rows.positions >= table.device_prompt_length[rows.slots]
        asks = torch.zeros_like(sampled) if plan.forces is None else plan.forces
        # A draft's row starts from the record of the row before it, so these go one after the other. The others of the
        # step are computed along and thrown away: which rows are whose is known on the device only.
        for draft in range(rows.draft_rows):
            mine = rows.valid if rows.draft_index is None else rows.valid & (rows.draft_index == draft)
            decided = self.clarification.force(
                logits, rows.slots, rows.positions, rows.input_ids, generated, asks, may, mine, statistics.log_normaliser
            )
            forced = torch.where(mine, decided.token_ids, forced)
        return forced

    def _alternatives(
        self, backend: Backend, logits: Tensor, statistics: LogitsMetrics, rows: Rows, records: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Ids and probabilities (at temperature 1, unfiltered) of the most probable tokens, ``[rows, count]`` each.

        The margin between the first two goes into the traced rows' ``records``.
        """
        vocabulary = logits.shape[-1]
        count = min(self.alternatives, vocabulary)
        log_normaliser = statistics.log_normaliser
        values, token_ids = backend.largest(logits, log_normaliser, min(max(count, 2), vocabulary))
        probabilities = (values.to(log_normaliser.dtype) - log_normaliser.unsqueeze(-1)).exp()
        if vocabulary > 1:
            margin, place = probabilities[:, 0] - probabilities[:, 1], column("margin")
            assert place is not None
            if not self.sequences.composition(rows.host_slots).all_traced:
                margin = torch.where(self.sequences.device_traced[rows.slots], margin, torch.nan)
            records[:, 1 + place] = margin.to(records.dtype)
        return (token_ids[:, :count], probabilities[:, :count]) if count else None


def _rules(samplers: Mapping[str, Sampler], backend: str) -> dict[str, KernelRule]:
    """The rules for this backend's decision kernel, of the samplers that have one."""
    found = {name: sampler.kernel_rule(backend) for name, sampler in samplers.items()}
    return {name: rule for name, rule in found.items() if rule is not None}


def _attention(rows: Rows, measure: Measure | None, of_rows: Callable[[], tuple[Tensor, Tensor]]) -> Attention:
    """What plans ask for attention: of sampled rows that they want, and of all traced ones.

    ``of_rows`` gives which are sampled and which are traced, bool ``[rows]`` each.
    """

    def attention(wanted: Tensor) -> AttentionStatistics | None:
        if measure is None:
            return None
        sampled, traced = of_rows()
        return measure(rows, rows.valid & (traced | (sampled & wanted)))

    return attention


@dataclass(frozen=True)
class _Waiting:
    """Rows whose samplers wait for what is drawn.

    Attributes:
        rows: those that were looked at.
        after_draw: (bool ``[rows]``, what is asked once they are drawn) of each sampler that wants to know.
        records: of the rows, or None.
    """

    rows: Rows
    after_draw: Collection[tuple[Tensor, Callable[[Tensor], Drawn]]]
    records: Tensor | None


def _tell(records: Tensor, drawn: Drawn, told: Tensor) -> None:
    """Put what is known after the draw into the records of the rows that are ``told``."""
    for name, values in drawn.fields.items():
        index = column(name)
        assert index is not None
        of_field = records[:, 1 + index]  # behind the slot
        of_field.copy_(values.to(records.dtype).where(told, of_field))


def _of_mine(attention: Attention, mine: Tensor, wanted: Tensor) -> AttentionStatistics | None:
    return attention(wanted & mine)


def _by_order(sampled: Tensor, orders: list[tuple[Tensor, Fidelity]]) -> dict[Fidelity, Tensor]:
    """The sampled rows by the order of their filters: those of another order are written by another call.

    Args:
        sampled: bool ``[rows]``.
        orders: bool ``[rows]``, rows of a sampler, and its order.
    """
    found = sorted({order for _, order in orders})
    if len(found) == 1:
        return {found[0]: sampled}
    return {one: sampled & torch.stack([mine for mine, order in orders if order == one]).any(dim=0) for one in found}


def _with_distributions(decided: Decisions, plans: list[tuple[Tensor, Plan]], sampled: Tensor, number: int) -> Decisions:
    """With the distributions that plans made themselves, and what they want to know of the draw.

    ``number`` samplers are in the batch, with and without a plan of ``plans``.
    """
    whole_plans = [(mine, one) for mine, one in plans if one.write is not None or one.after_draw is not None]
    if not whole_plans:
        return decided
    written, whole, after_draw = dict(decided.written), [], []
    for mine, one in whole_plans:
        own = mine & sampled
        if one.write is not None:
            whole.append((own, one.write))
            written[one.order] = written[one.order] ^ own  # they were among these
        if one.after_draw is not None:
            after_draw.append((own, one.after_draw))
    return replace(decided, written=written if len(whole) < number else {}, whole=whole, after_draw=after_draw)


def _mixed(plans: list[tuple[Tensor, Plan]], alone: bool) -> Plan:
    """One plan, with what each row's own sampler plans; ``alone``: all rows are the first one's."""
    (_, first), *others = plans
    if alone:
        return first
    parameters, attention = first.parameters, first.attention
    for mine, plan in others:
        parameters = plan.parameters.where(mine, parameters)
        attention = attention.overlaid(mine, plan.attention) if attention and plan.attention else attention or plan.attention
    fields = {
        name: torch.where(mine, values.to(parameters.temperature.dtype), torch.nan)
        for mine, plan in plans
        for name, values in plan.fields.items()
    }
    asking = [mine & plan.forces for mine, plan in plans if plan.forces is not None]
    forces = torch.stack(asking).any(dim=0) if asking else None
    return Plan(parameters, first.order, forces, attention, fields)


def _records(
    plan: Plan,
    statistics: LogitsMetrics,
    attention: AttentionStatistics | None,
    forced: Tensor,
    argmax: Tensor,
    slots: Tensor,
    asks_device: bool,
) -> Tensor:
    """Slots and records ``[rows, columns]``; the parameters of rows of the bool mask ``argmax`` are those of argmax."""
    metrics, parameters = joined(statistics, attention), plan.parameters
    if not (asks_device and not argmax.any()):
        parameters = parameters.as_argmax(argmax)

    def values(field: str) -> Tensor:
        """A field's column: whoever computes it holds it by its name."""
        if field == "forced":
            return forced >= 0
        if field in plan.fields:
            return plan.fields[field]
        holder = next((holder for holder in (metrics, parameters) if hasattr(holder, field)), None)
        return torch.full_like(metrics.entropy, torch.nan) if holder is None else getattr(holder, field)

    columns = (slots, *map(values, names()))  # slots are exact, as token ids are: there are fewer than 2**24
    return torch.stack([column.to(torch.float32) for column in columns], dim=-1)
