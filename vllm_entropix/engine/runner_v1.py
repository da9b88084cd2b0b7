"""Adapter for vLLM's Model Runner V1 (what a CPU runs)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_entropix.engine.adapter import RunnerAdapter
from vllm_entropix.rows.rows import Rows

if TYPE_CHECKING:
    import numpy as np


class RunnerV1(RunnerAdapter):
    """Row i of the logits belongs to request i of the runner's persistent batch: its last scheduled token."""

    _expected = False

    def hook(self) -> None:
        """Wrap ``Sampler.sample``: after masks and penalties, before vLLM's temperature and filters."""
        self._set_aside: dict[int, torch.Generator] = {}
        sampler = self.runner.sampler
        original = sampler.sample

        def sample(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.transform(logits)
            if self.device.type == "cpu":
                self._set_generators_aside()
            return original(logits, *args, **kwargs)

        sampler.sample = sample

    def processors(self) -> tuple[list[Any], list[Any]]:
        """See the base class. vLLM applies those that may change the most probable token before it samples."""
        processors = self.runner.input_batch.logitsprocs
        return processors.non_argmax_invariant, processors.argmax_invariant

    def begin_step(self, scheduler_output: Any) -> None:
        """See the base class; and note that the next logits are those of requests."""
        super().begin_step(scheduler_output)
        if self.samples and self._set_aside:
            # Before vLLM moves requests to other rows.
            self.runner.input_batch.generators.update(self._set_aside)
            self._set_aside.clear()
        self._expected = scheduler_output.total_num_scheduled_tokens > 0

    def _set_generators_aside(self) -> None:
        """Let rows whose token is thrown away, of unfinished prompts, draw without their seeds' generators until the next step.

        vLLM would turn those back after the draw, which no generator of a CPU can be: ``set_offset`` raises, and the engine
        ends. A generator that isn't used needn't be.
        """
        generators = self.runner.input_batch.generators
        discarded = self.runner.discard_request_mask.np
        for row in [row for row in generators if discarded[row]]:
            self._set_aside[row] = generators.pop(row)

    def batch_of_step(self) -> tuple[list[str], np.ndarray]:
        """See the base class."""
        count = self.runner.input_batch.num_reqs
        return list(self.runner.input_batch.req_ids[:count]), ~self.runner.discard_request_mask.np[:count]

    def transform(self, logits: Tensor) -> None:
        """Turn the logits of one step into final distributions, in place."""
        batch = self.runner.input_batch
        count = batch.num_reqs
        # Dummy runs have rows without requests.
        expected, self._expected = self._expected, False
        if not expected or logits.shape[0] != count or not len(self.batch.sequences):
            return
        slots = self.batch.sequences.slots_of(batch.req_ids, count)
        last = (self.runner.query_start_loc.gpu[1 : count + 1] - 1).long()
        rows = Rows(
            slots=torch.from_numpy(slots).to(self.device),
            host_slots=slots,
            positions=self.runner.positions[last].long(),
            input_ids=self.runner.input_ids.gpu[last].long(),
            valid=torch.from_numpy(~self.runner.discard_request_mask.np[:count]).to(self.device),
            batch=torch.arange(count, device=self.device),
        )
        self.apply(logits, rows)
