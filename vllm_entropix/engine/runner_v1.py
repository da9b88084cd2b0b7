"""Adapter for vLLM's Model Runner V1 (what a CPU runs)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.utils.platform_utils import is_uva_available

from vllm_entropix.engine.adapter import RunnerAdapter
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import together_to_device
from vllm_entropix.rows.text import RowText

if TYPE_CHECKING:
    import numpy as np


class RunnerV1(RunnerAdapter):
    """Row i of the logits belongs to request i of the runner's persistent batch: its last scheduled token."""

    _expected = False

    def hook(self) -> None:
        """Wrap ``Sampler.sample``: after masks and penalties, before vLLM's temperature and filters."""
        self._set_aside: dict[int, torch.Generator] = {}
        # Tokens by our slot and position, from the first request on whose sampler looks at them: in the runner's own buffer, on
        # the host, -1 stands for every token that asynchronous scheduling had not seen yet.
        self._text: Tensor | None = None
        self._in_order = torch.arange(self.max_requests, device=self.device)
        sampler = self.runner.sampler
        original = sampler.sample

        def sample(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.transform(logits)
            if self.device.type == "cpu":
                self._set_generators_aside()
            result = original(logits, *args, **kwargs)
            self.drawn(result[0].view(-1, 1))
            return result

        sampler.sample = sample

    def reserve(self) -> None:
        """See the base class; and take room for texts, where the server's own sampler looks at them, before requests wait."""
        super().reserve()
        default = self.batch.samplers[self.batch.sequences.default]
        if self.samples and default.reads_text(dict(default.numbers())):
            self._text = self._grown_text()

    def keep_prompt(self, request: Any) -> None:
        """See the base class."""
        [slot] = self.batch.sequences.slots_of([request.req_id], 1).tolist()
        text = self._text = self._grown_text()
        if request.prompt_token_ids is None:  # embeddings, which repeat nothing
            text[slot] = -1
        else:
            prompt = torch.tensor(request.prompt_token_ids, dtype=torch.int32)
            text[slot, : len(prompt)] = prompt.to(self.device, non_blocking=True)

    def _grown_text(self) -> Tensor:
        """The kept tokens, with room for all slots."""
        slots, before = self.batch.sequences.slots, self._text
        if before is not None and len(before) >= slots:
            return before
        size = (slots, self.vllm_config.model_config.max_model_len)
        if self.device.type == "cuda" and is_uva_available():
            from vllm.v1.worker.gpu.buffer_utils import UvaBuffer  # which a CPU's runner never loads

            # As Model Runner V2 keeps its own: in the host's memory, which the device reads. It may be gigabytes, and what the
            # device has left is the KV cache's by the time a request asks for a chain.
            grown: Tensor = UvaBuffer(size, torch.int32).uva()
        else:
            # Nothing is read that wasn't written, so that a CPU's memory is taken by texts alone.
            grown = torch.empty(*size, dtype=torch.int32, device=self.device)
        if before is not None:
            grown[: len(before)] = before
        return grown

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
        last = self.runner.query_start_loc.gpu[1 : count + 1] - 1
        on_device, valid = together_to_device((slots, ~self.runner.discard_request_mask.np[:count]), self.device)
        rows = Rows(
            slots=on_device,
            host_slots=slots,
            positions=self.runner.positions.index_select(0, last).long(),
            input_ids=self.runner.input_ids.gpu.index_select(0, last).long(),
            valid=valid,
            batch=self._in_order[:count],
        )
        self.apply(logits, self._with_text(rows))

    def _with_text(self, rows: Rows) -> Rows:
        """The rows with the text before each, to which their own tokens belong from now on."""
        if self._text is None:
            return rows
        kept = self._text = self._grown_text()
        text = RowText(
            kept=kept,
            owners=rows.slots,
            positions=rows.positions,
            drafts=torch.zeros_like(rows.positions),
            input_ids=rows.input_ids,
            index=rows.batch,
            longest=int(self.runner.input_batch.num_tokens_no_spec[: len(rows.host_slots)].max()),
        )
        kept[rows.slots, rows.positions] = rows.input_ids.to(kept.dtype)
        return replace(rows, text=text)
