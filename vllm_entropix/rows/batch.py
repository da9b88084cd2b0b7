"""Entropix for a running engine: turns a batch's logits into the distributions that the engine then draws from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.kernels.backend import kernels_for
from vllm_entropix.records.fields import names
from vllm_entropix.records.regimes import Regime
from vllm_entropix.rows.forcing import Clarification
from vllm_entropix.rows.rows import Measure, Rows
from vllm_entropix.rows.table import Sequence, SequenceTable
from vllm_entropix.samplers.entropix.sampler import Decision, EntropixSampler

if TYPE_CHECKING:
    from vllm_entropix.samplers.entropix.settings import EntropixConfig


class BatchSampler:
    """Applies entropix to the rows of sequences that want it, and leaves all others untouched.

    Args:
        config: the server's configuration.
        slots: room for this many sequences at first (it grows).
        clarification: ids of the clarification, or None if none is ever forced.
        device: of the logits.
        draft_tokens: drafts verified in one step at most.
        counted: make records of all sampled rows, and not only of traced ones.
    """

    def __init__(
        self,
        config: EntropixConfig,
        slots: int,
        clarification: tuple[int, ...] | None,
        device: torch.device | str,
        draft_tokens: int = 0,
        counted: bool = False,
    ) -> None:
        self.counted = counted
        self.sampler = EntropixSampler(config, kernels=True)
        self.sequences = SequenceTable(config, slots + 1, device)
        self.clarification = (
            None if clarification is None else Clarification(clarification, config, slots + 1, draft_tokens, device)
        )

    def add(self, request_id: str, sequence: Sequence) -> None:
        """A sequence begins; one that is known already (resumed after a preemption) keeps what is remembered of it."""
        begins = request_id not in self.sequences
        slot = self.sequences.add(request_id, sequence)
        if self.clarification is not None and begins:
            if self.sequences.slots > self.clarification.records.shape[0]:
                self.clarification.grow(self.sequences.slots)
            self.clarification.forget(slot)

    def remove(self, request_id: str) -> None:
        """A sequence has ended."""
        self.sequences.remove(request_id)

    def warm_up(self, vocabulary: int) -> None:
        """Run a step of a traced row that belongs to nobody, which compiles the kernels that steps run."""
        name, device = "nobody", self.sequences.device
        constants = [value for _, value in self.sampler.config.numbers()]
        self.add(name, Sequence(constants, sampled=True, traced=True, clarified=False, prompt_length=0))
        self.sequences.flush()
        slots = self.sequences.slots_of([name], 1)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        rows = Rows(torch.from_numpy(slots).to(device), slots, positions=zero, fed=zero, valid=zero == 0, batch=zero)
        self.apply(torch.zeros(1, vocabulary, device=device), rows, None)
        self.remove(name)

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
        sampled, traced = table.sampled[rows.host_slots], table.traced[rows.host_slots]
        concerned = sampled | traced
        if not concerned.any():
            return None
        if concerned.all():
            return self._apply(logits, rows, measure, bool(traced.any()), bool(sampled.all()))
        if logits.device.type != "cpu":
            return self._apply(logits, rows, measure, bool(traced.any()), everywhere=False)
        # On the CPU it pays to work on the rows concerned only, and asking for their indices costs nothing.
        index = (table.device_sampled[rows.slots] | table.device_traced[rows.slots]).nonzero().flatten()
        chosen = logits[index]
        records = self._apply(chosen, rows.select(index), measure, bool(traced.any()), everywhere=False)
        logits[index] = chosen
        return records

    def _apply(self, logits: Tensor, rows: Rows, measure: Measure | None, tracing: bool, everywhere: bool) -> Tensor | None:
        table, config = self.sequences, self.sampler.config
        sampled = table.device_sampled[rows.slots]
        traced = table.device_traced[rows.slots]

        def statistics(regime: Tensor) -> AttentionStatistics | None:
            if measure is None:
                return None
            return measure(rows, rows.valid & (traced | (sampled & (regime != Regime.LELV))))

        decision = self.sampler.decide(logits, statistics, table.of_rows(rows.slots))
        alternatives = _alternatives(logits, decision, config.trace.alternatives, self.sampler.kernels) if tracing else None
        forced = self._force(logits, rows, decision, sampled)
        fused = self.sampler.kernels and config.fidelity == "corrected" and logits.dtype == torch.float32
        kernels = kernels_for(logits.device) if fused else None
        # The device isn't asked for the rows' top_k, unless asking costs nothing.
        on_cpu = logits.device.type == "cpu"
        if kernels == "numba":
            _write_by_cpu_kernel(logits, decision, forced, sampled)
        elif kernels == "triton" and self._draws_fit(rows):
            _write_by_triton_kernels(logits, decision, forced, sampled, int(table.largest_top_k[rows.host_slots].max()))
        else:
            candidates = int(decision.top_k.max() if on_cpu else table.largest_top_k[rows.host_slots].max())
            _write(logits, decision, forced, candidates, None if everywhere else sampled)
        if not (tracing or self.counted):
            return None
        told = (traced | sampled) if self.counted else traced
        return _records(decision, forced, sampled, torch.where(told & rows.valid, rows.slots, 0), alternatives)

    def _draws_fit(self, rows: Rows) -> bool:
        """Are the candidates of which ADAPTIVE takes the best of n few enough for the Triton kernels?"""
        from vllm_entropix.kernels.triton_.candidates import LIMIT

        table = self.sequences
        return bool(table.constants[rows.host_slots, table.columns["adaptive.top_k_max"]].max() <= LIMIT)

    def _force(self, logits: Tensor, rows: Rows, decision: Decision, sampled: Tensor) -> Tensor:
        """int64 ``[rows]``: the token forced at each row, -1 for none."""
        if self.clarification is None:
            return torch.full_like(decision.regime, -1)
        table = self.sequences
        may = sampled & table.device_clarified[rows.slots]
        generated = rows.positions >= table.device_prompt_length[rows.slots]
        asks = decision.regime == Regime.HELV
        forced = torch.full_like(decision.regime, -1)
        # A draft's row starts from the record of the row before it, so these go one after the other. The others of the
        # step are computed along and thrown away: which rows are whose is known on the device only.
        for place in range(rows.draft_rows):
            mine = rows.valid if rows.draft_index is None else rows.valid & (rows.draft_index == place)
            decided = self.clarification.force(
                logits, rows.slots, rows.positions, rows.fed, generated, asks, may, mine, decision.log_normaliser
            )
            forced = torch.where(mine, decided.token_ids, forced)
        return forced


def _write(logits: Tensor, decision: Decision, forced: Tensor, candidates: int, sampled: Tensor | None) -> None:
    """Overwrite the sampled rows (None: all) with the log-probabilities they are drawn from."""
    kept, probabilities = decision.candidates(candidates)
    is_forced = (forced >= 0).unsqueeze(-1)
    # In a forced row every candidate is the forced token with probability 1: writes to one place must agree.
    token_ids = torch.where(is_forced, forced.unsqueeze(-1), kept.token_ids)
    log_probabilities = torch.where(is_forced, 0.0, probabilities.log()).to(logits.dtype)
    if sampled is None:
        logits.fill_(-torch.inf)
    else:
        # Rows that aren't sampled get their own logits back.
        log_probabilities = torch.where(sampled.unsqueeze(-1), log_probabilities, kept.logits.to(logits.dtype))
        token_ids = torch.where(sampled.unsqueeze(-1), token_ids, kept.token_ids)
        logits.masked_fill_(sampled.unsqueeze(-1), -torch.inf)
    logits.scatter_(-1, token_ids, log_probabilities)


def _write_by_cpu_kernel(logits: Tensor, decision: Decision, forced: Tensor, sampled: Tensor) -> None:
    """The same in one call."""
    from vllm_entropix.kernels.numba_.distribute import distribute_rows
    from vllm_entropix.kernels.numba_.threads import share_rows

    parameters = decision.parameters
    rows, vocabulary = logits.shape
    arguments = (
        logits.numpy(),
        parameters.temperature.numpy(),
        parameters.top_p.numpy(),
        parameters.top_k.numpy(),
        parameters.min_p.numpy(),
        parameters.samples.numpy(),
        decision.log_normaliser.numpy(),
        forced.numpy(),
        sampled.numpy(),
    )
    share_rows(np.full(rows, 2 * vocabulary), lambda first, last: distribute_rows(*arguments, first, last))


def _write_by_triton_kernels(logits: Tensor, decision: Decision, forced: Tensor, sampled: Tensor, largest_top_k: int) -> None:
    """The same on a GPU; ``largest_top_k`` bounds the rows' own."""
    from vllm_entropix.kernels.triton_.candidates import LIMIT, distribute
    from vllm_entropix.kernels.triton_.wide_filters import filter_wide_rows

    p = decision.parameters
    distribute(logits, p.temperature, p.top_p, p.top_k, p.min_p, p.samples, forced, sampled, largest_top_k)
    if largest_top_k > LIMIT:
        filter_wide_rows(logits, p.temperature, p.top_p, p.top_k, p.min_p, forced, sampled)


def _alternatives(logits: Tensor, decision: Decision, count: int, kernels: bool) -> tuple[Tensor, Tensor] | None:
    """Ids and probabilities (at temperature 1, unfiltered) of the most probable tokens, ``[rows, count]`` each."""
    count = min(count, logits.shape[-1])
    if not count:
        return None
    if kernels and kernels_for(logits.device) == "numba" and logits.dtype == torch.float32:
        values, token_ids = _largest_by_cpu_kernel(logits, decision.log_normaliser, count)
    else:
        values, token_ids = logits.topk(count, dim=-1)
    return token_ids, (values.to(decision.log_normaliser.dtype) - decision.log_normaliser.unsqueeze(-1)).exp()


def _largest_by_cpu_kernel(logits: Tensor, log_normaliser: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same as ``topk``."""
    from vllm_entropix.kernels.numba_.alternatives import largest_of_rows
    from vllm_entropix.kernels.numba_.threads import share_rows

    rows, vocabulary = logits.shape
    values, token_ids = logits.new_empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
    arguments = logits.numpy(), log_normaliser.numpy(), values.numpy(), token_ids.numpy()
    share_rows(np.full(rows, vocabulary), lambda first, last: largest_of_rows(*arguments, first, last))
    return values, token_ids


def _records(
    decision: Decision, forced: Tensor, sampled: Tensor, slots: Tensor, alternatives: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Slots, records and alternatives ``[rows, columns]``; a greedy row's parameters are those of argmax."""
    metrics, parameters = decision.metrics, decision.parameters
    if not sampled.all() if sampled.device.type == "cpu" else True:
        parameters = parameters.as_argmax(~sampled)
    unknown = torch.full_like(metrics.entropy, torch.nan)

    def values(field: str) -> Tensor:
        """A field's column: whoever computes it holds it by its name."""
        if field == "forced":
            return forced >= 0
        holder = next((holder for holder in (metrics, parameters, decision) if hasattr(holder, field)), None)
        return unknown if holder is None else getattr(holder, field)

    columns = (slots, *map(values, names()))  # slots are exact, as token ids are: there are fewer than 2**24
    records = torch.stack([column.to(torch.float32) for column in columns], dim=-1)
    if alternatives is None:
        return records
    return torch.cat((records, *(block.to(torch.float32) for block in alternatives)), dim=-1)
