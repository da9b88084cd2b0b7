"""Adapter for vLLM's Model Runner V2 (what a GPU runs), by a logits processor.

The processor runs where rejection sampling sees it too: for each draft row, with that row's position, token and queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from vllm_entropix.engine.adapter import RunnerAdapter
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.text import RowText

if TYPE_CHECKING:
    import numpy as np
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext


class RunnerV2(RunnerAdapter):
    """Rows belong to request slots of the runner; a slot is lent to a request until it ends or is preempted."""

    def hook(self) -> None:
        """Put our processor behind all others.

        The model config doesn't name it: vLLM allows no custom processor there together with return_sampling_mask.
        """
        self.runner.sampler.logits_processors.append(EntropixLogitsProcessor(self))
        self._text_is_read = False
        original = self.runner.sample

        def sample(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            output, number, _ = result
            self.drawn(output.sampled_token_ids, number)
            return result

        self.runner.sample = sample
        # Runner's slot → the request's index in the batch that the model ran.
        self._batch_of_slot = torch.zeros(self.max_requests, dtype=torch.int64, device=self.device)
        self._in_order = torch.arange(self.max_requests, device=self.device)

    def keep_prompt(self, request: Any) -> None:
        """See the base class: the runner keeps all tokens, which are looked at from now on."""
        self._text_is_read = True

    def _text(self, context: LogitsContext) -> RowText:
        return RowText(
            kept=self.runner.req_states.all_token_ids.gpu,
            owners=context.expanded_idx_mapping.long(),
            positions=context.pos.long(),
            drafts=context.expanded_local_pos.long(),
            input_ids=context.input_ids.long(),
            index=torch.arange(len(context.pos), device=self.device),
            longest=int(context.seq_lens_upper_bound_np.max()),
        )

    def processors(self) -> tuple[list[Any], list[Any]]:
        """See the base class. There is one list, in which ours stands."""
        processors = self.runner.sampler.logits_processors
        ours = next(index for index, one in enumerate(processors) if isinstance(one, EntropixLogitsProcessor))
        return processors[:ours], processors[ours + 1 :]

    def after_forward(self) -> None:
        """Note which request of the batch is in which slot: the sampler may be handed the batch in parts."""
        state = self.runner.execute_model_state
        if state is None or not self.samples or (self.observer is None and not self.batch.follows_draws):
            return
        slots = state.input_batch.idx_mapping
        self._batch_of_slot.index_copy_(0, slots, self._in_order[: len(slots)])

    def batch_of_step(self) -> tuple[list[str], np.ndarray]:
        """See the base class."""
        batch = self.runner.execute_model_state.input_batch
        ends = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        return batch.req_ids, ends[: batch.num_reqs] >= batch.prefill_len_np[: batch.num_reqs]

    def slot_of(self, runner_slot: int) -> int:
        """Our slot of the request in a runner's slot; 0 if entropix has nothing to do with it."""
        # In vLLM's profiling (0.33) there are slots without a request.
        request_id = self.runner.req_states.index_to_req_id.get(runner_slot)
        return 0 if request_id is None else int(self.batch.sequences.slots_of([request_id], 1)[0])

    def transform(self, logits: Tensor, slots: Any, prefill_length: Tensor, context: LogitsContext) -> None:
        """Turn the logits of one step, or a part of it, into final distributions, in place.

        Args:
            logits: float32 ``[rows, vocab]``.
            slots: our slots by runner's slot, on host and device.
            prefill_length: tokens to be filled in before anything is drawn, by runner's slot.
            context: vLLM's description of the rows.
        """
        mapping = context.expanded_idx_mapping
        drafts = logits.shape[0] != len(context.idx_mapping_np)
        rows = Rows(
            # Selected: the host takes twice as long for an index.
            slots=slots.gpu.index_select(0, mapping),
            host_slots=slots.np[context.idx_mapping_np],
            positions=context.pos,
            input_ids=context.input_ids.long(),
            valid=context.pos + 1 >= prefill_length.index_select(0, mapping),
            batch=self._batch_of_slot.index_select(0, mapping),
            draft_index=context.expanded_local_pos if drafts else None,
            draft_rows=self.rows_per_request if drafts else 1,
            text=self._text(context) if self._text_is_read else None,
        )
        self.apply(logits, rows)


class EntropixLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """vLLM's interface to the adapter.

    Args:
        adapter: of the runner that the processor is called by.
    """

    def __init__(self, adapter: RunnerV2) -> None:
        self._adapter = adapter
        self._prefill_length = adapter.runner.req_states.prefill_len
        self._slots = UvaBackedTensor(adapter.max_requests, dtype=torch.int64)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request takes a slot of the runner; True if its logits are changed or traced."""
        slot = self._slots.np[req_idx] = self._adapter.slot_of(req_idx)
        return slot != 0

    def apply_staged_writes(self) -> None:
        """Send the slots to the device."""
        self._slots.copy_to_uva()

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Final distributions for the rows of entropix, all others untouched."""
        self._adapter.transform(logits, self._slots, self._prefill_length.gpu, ctx)
        return logits
