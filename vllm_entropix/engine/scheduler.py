"""What is added to vLLM's scheduler: each new token's record goes beside it, within the bounds of the settings."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

from vllm_entropix.engine.carrier import (
    ABSTAINS,
    COUNTED,
    RECORDS,
    SCORED,
    STATE,
    STATES,
    TRACED,
    WRITTEN,
    Records,
    attach_to_sequence,
)
from vllm_entropix.engine.resolved import Resolved
from vllm_entropix.engine.shared_blocks import share_blocks
from vllm_entropix.rows.table import Told
from vllm_entropix.samplers import registry


class EntropixSchedulerMixin:
    """Mixed in front of any of vLLM's schedulers (see ``subclasses``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        resolved = Resolved.from_config(self.vllm_config, "the scheduler")  # type: ignore[attr-defined]
        self._entropix_counted = resolved.counted
        self._entropix_config = resolved.config
        self._entropix_samplers = registry.instances_and_observed(resolved.config)
        self._entropix_cap = resolved.config.trace.max_tokens
        self._entropix_to_disk = resolved.config.trace.path is not None
        self._entropix_model = self.vllm_config.model_config.served_model_name  # type: ignore[attr-defined]
        if resolved.config.forks.mechanism == "auto":
            share_blocks(self)
        # Traced tokens of the running requests.
        self._entropix_sent: dict[str, int] = {}
        # What the running requests that are scored abstain by: score, above and below; None: by nothing.
        self._entropix_scored: dict[str, list[Any] | None] = {}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """The engine's outputs of a step, with each new token's record beside it."""
        records: Records | None = getattr(model_runner_output, RECORDS, None)
        labels = self._labels(records) if records and self._entropix_to_disk else {}
        if records:
            self._note_abstentions(records)
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for of_running in (self._entropix_sent, self._entropix_scored):
            for request_id in of_running.keys() & scheduler_output.finished_req_ids:
                del of_running[request_id]
        if not records:
            return result
        states: dict[str, bytes] = getattr(model_runner_output, STATES, {})
        for outputs in result.values():
            for output in outputs.outputs:
                record = records.get(output.request_id)
                if record is not None and output.new_token_ids:
                    carried = self._carry(output, *record)
                    if labels and TRACED in carried and output.request_id in labels:
                        carried[WRITTEN] = labels[output.request_id]
                    if TRACED in carried and output.request_id in states:
                        carried[STATE] = states[output.request_id]
                    if carried:
                        attach_to_sequence(output, carried)
        return result

    def _labels(self, records: Records) -> dict[str, dict[str, Any]]:
        """By request id, for sequences that begin with these records: what their lines on disk will tell of the engine."""
        labels = {}
        requests: dict[str, Any] = self.requests  # type: ignore[attr-defined]
        for request_id, (told, _, _) in records.items():
            if not told.traced or request_id in self._entropix_sent or request_id not in requests:
                continue
            settings = registry.parse_request(requests[request_id].sampling_params.extra_args, self._entropix_config)
            sampler = self._entropix_samplers[registry.sampler_of(settings, self._entropix_config)]
            labels[request_id] = {
                "trace": self._entropix_config.trace.model_dump(),
                "counted": self._entropix_counted,
                "line": {
                    "model": self._entropix_model,
                    "sampler": sampler.described(settings).model_dump(),
                },
            }
        return labels

    def _note_abstentions(self, records: Records) -> None:
        """Read what scored requests abstain by, before those that end with these records are forgotten."""
        requests: dict[str, Any] = self.requests  # type: ignore[attr-defined]
        for request_id, (told, _, _) in records.items():
            if told.scored and request_id not in self._entropix_scored and request_id in requests:
                abstention = registry.parse_request(requests[request_id].sampling_params.extra_args).abstention
                self._entropix_scored[request_id] = None if abstention is None else list(astuple(abstention))

    def _carry(self, output: Any, told: Told, rows: int, data: bytes) -> dict[str, Any]:
        # A draft that was rejected has rows and no tokens.
        tokens, width = len(output.new_token_ids), len(data) // rows
        carried: dict[str, Any] = {COUNTED: data[: tokens * width]} if self._entropix_counted else {}
        if told.scored:
            carried[SCORED] = [width, data[: tokens * width]]
            if (abstention := self._entropix_scored.get(output.request_id)) is not None:
                carried[ABSTAINS] = abstention
        if told.traced:
            sent = self._entropix_sent.get(output.request_id, 0)
            self._entropix_sent[output.request_id] = sent + tokens
            kept = min(tokens, self._entropix_cap - sent)
            if kept > 0:
                carried[TRACED] = [width, data[: kept * width]]
        return carried
