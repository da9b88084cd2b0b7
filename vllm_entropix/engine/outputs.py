"""Carries records of tokens from the worker to the frontend.

worker: an attribute on ModelRunnerOutput → scheduler: bytes in each EngineCoreOutput's ``kv_transfer_params``, beside its token
→ frontend: collected per sequence as ``CompletionOutput.entropix_trace`` if the request is traced, and counted; written to disk
when the sequence is finished, if the server's settings name a path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from vllm_entropix.engine.resolved import Resolved
from vllm_entropix.observability import disk, prometheus
from vllm_entropix.records.entropix import EntropixPart
from vllm_entropix.records.fields import record_bytes
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.samplers.request import RequestSettings
from vllm_entropix.settings.server import Trace

# Request id → (is it traced?, rows, their records one after the other).
Records = dict[str, tuple[bool, int, bytes]]
# Attribute of ModelRunnerOutput that holds them.
RECORDS = "entropix_records"
# Keys in kv_transfer_params, the one field of EngineCoreOutput that takes any plugin's data, for records that are kept and
# counted, and for those that are only counted. They never leave the frontend: bytes there would break the HTTP response.
TRACED, COUNTED = "entropix_traced", "entropix_counted"
# Comes with the first record of a sequence that is to be written to disk: what its line says of the engine.
WRITTEN = "entropix_written"
_OURS = frozenset({TRACED, COUNTED, WRITTEN})


def by_request(values: np.ndarray, requests: dict[int, tuple[str, bool]]) -> Records:
    """Each sequence's records, one after the other; without alternatives if it is only counted.

    Args:
        values: float32 ``[rows, columns]``: slot (0 for rows to skip), record, alternatives.
        requests: slot → (request id, is it traced?).
    """
    # Cut out of one string: an array's own indexing takes longer than all else here, and this runs in every step.
    data = values[:, 1:].tobytes()
    width, counted_width = 4 * (values.shape[1] - 1), record_bytes()
    found: Records = {}
    for row, slot in enumerate(values[:, 0].tolist()):
        known = requests.get(slot) if slot else None  # a whole number as a float finds the integer's entry
        if known is None:
            continue
        request_id, traced = known
        begin = row * width
        record = data[begin : begin + (width if traced else counted_width)]
        before = found.get(request_id)
        found[request_id] = (traced, 1, record) if before is None else (traced, before[1] + 1, before[2] + record)
    return found


class EntropixSchedulerMixin:
    """Mixed in front of any of vLLM's schedulers (see ``subclasses``)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        resolved = Resolved.from_config(self.vllm_config, "the scheduler")  # type: ignore[attr-defined]
        self._entropix_counted = resolved.counted
        self._entropix_config = resolved.config
        self._entropix_cap = resolved.config.trace.max_tokens
        self._entropix_to_disk = resolved.config.trace.path is not None
        self._entropix_model = self.vllm_config.model_config.served_model_name  # type: ignore[attr-defined]
        # Traced tokens of the running requests.
        self._entropix_sent: dict[str, int] = {}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """The engine's outputs of a step, with each new token's record beside it."""
        records: Records | None = getattr(model_runner_output, RECORDS, None)
        labels = self._labels(records) if records and self._entropix_to_disk else {}
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for request_id in self._entropix_sent.keys() & scheduler_output.finished_req_ids:
            del self._entropix_sent[request_id]
        if not records:
            return result
        for outputs in result.values():
            for output in outputs.outputs:
                record = records.get(output.request_id)
                if record is not None and output.new_token_ids:
                    carried = self._carry(output, *record)
                    if labels and TRACED in carried and output.request_id in labels:
                        carried[WRITTEN] = labels[output.request_id]
                    if carried:
                        others = output.kv_transfer_params
                        output.kv_transfer_params = {**others, **carried} if others else carried
        return result

    def _labels(self, records: Records) -> dict[str, dict[str, Any]]:
        """By request id, for sequences that begin with these records: what their lines on disk will tell of the engine."""
        labels = {}
        requests: dict[str, Any] = self.requests  # type: ignore[attr-defined]
        for request_id, (traced, _, _) in records.items():
            if not traced or request_id in self._entropix_sent or request_id not in requests:
                continue
            config = RequestSettings.parse(requests[request_id].sampling_params.extra_args).config(self._entropix_config)
            labels[request_id] = {
                "trace": self._entropix_config.trace.model_dump(),
                "counted": self._entropix_counted,
                "line": {
                    "model": self._entropix_model,
                    "sampler": EntropixPart.from_config(config).model_dump(),
                },
            }
        return labels

    def _carry(self, output: Any, traced: bool, rows: int, data: bytes) -> dict[str, Any]:
        # Of a draft that was rejected there are rows and no tokens.
        tokens, width = len(output.new_token_ids), len(data) // rows
        carried: dict[str, Any] = {COUNTED: data[: tokens * width]} if self._entropix_counted else {}
        if traced:
            sent = self._entropix_sent.get(output.request_id, 0)
            self._entropix_sent[output.request_id] = sent + tokens
            kept = min(tokens, self._entropix_cap - sent)
            if kept > 0:
                carried[TRACED] = [width, data[: kept * width]]
        return carried


@dataclass(repr=False)
class TracedCompletion(CompletionOutput):  # type: ignore[misc]  # vLLM isn't typed here
    """vLLM's CompletionOutput with its trace as a field, which ``dataclasses.replace`` keeps and ``==`` compares."""

    entropix_trace: TokenTrace | None = None


def receive_records(state: Any, arguments: dict[str, Any], make: Callable[[], Any]) -> Any:
    """Collect what came with a request's new tokens, and hang it on the outputs that are made of them.

    Args:
        state: the frontend's RequestState.
        arguments: of its ``make_request_output``, by name; our bytes are taken out of them.
        make: calls it with them.
    """
    carried = arguments.get("kv_transfer_params")
    # Children of one request with n > 1 share the parent, which hands out all their outputs together.
    shared = state.parent_req or state
    collected: dict[int, TokenTrace] | None = getattr(shared, "entropix_traces", None)
    if not carried and not collected:
        return make()
    tokens = len(arguments["new_token_ids"])
    traced = counted = None
    if carried:
        traced, counted = carried.get(TRACED), carried.get(COUNTED)
        if traced or counted:
            if WRITTEN in carried:
                state.entropix_label = carried[WRITTEN]
            arguments["kv_transfer_params"] = {key: value for key, value in carried.items() if key not in _OURS} or None
    if counted and tokens:
        prometheus.count(counted, tokens)
    if traced:
        if collected is None:
            collected = shared.entropix_traces = {}
        width, records = traced
        trace = collected.get(state.request_index)
        if trace is None:
            trace = collected[state.request_index] = TokenTrace(width)
        trace.extend(records, tokens)
    elif collected and state.request_index in collected:
        collected[state.request_index].extend(b"", tokens)  # beyond the cap
    result = make()
    if not collected:
        return result
    finish_reason = arguments["finish_reason"]
    if finish_reason is not None and getattr(state, "entropix_label", None) is not None:
        _write(state, str(finish_reason), collected[state.request_index])
    if result is not None:
        for completion in result.outputs:
            trace = collected.get(completion.index)
            if trace is not None:
                completion.__class__ = TracedCompletion
                completion.entropix_trace = _handed_out(trace, completion, state.output_kind)
    return result


def _handed_out(trace: TokenTrace, completion: Any, kind: RequestOutputKind) -> TokenTrace:
    """The trace of the tokens that a completion holds: a value, which doesn't grow with the sequence."""
    if kind != RequestOutputKind.DELTA:
        return trace[:]
    tokens = len(completion.token_ids)
    before = len(trace) + trace.not_kept - tokens
    part = trace[before:] if before < len(trace) else trace[:0]
    part.not_kept = tokens - len(part)
    return part


def merge_traces(output: Any, following: Any, merge: Callable[[], Any]) -> Any:
    """Join the traces of two outputs of a request, whose deltas vLLM joins because nobody has read the first yet.

    Args:
        output: vLLM's RequestOutput, which gets what the other has.
        following: the other.
        merge: does so with all that vLLM knows.
    """
    before = {completion.index: completion for completion in output.outputs}
    result = merge()
    after = {completion.index: completion for completion in output.outputs}
    for completion in following.outputs:
        trace, same = getattr(completion, "entropix_trace", None), before.get(completion.index)
        # Otherwise it was taken over as it is: a first of its index, or one that holds all tokens so far.
        if trace is not None and same is not None and same is after[completion.index]:
            same.entropix_trace.join(trace)
    return result


def _write(state: Any, finish_reason: str, trace: TokenTrace) -> None:
    """Have a finished sequence written to disk."""
    label, state.entropix_label = state.entropix_label, None
    settings = Trace.model_validate(label["trace"])
    # Children of one request with n > 1 share its prompt.
    prompt: disk.Prompt | None = getattr(state.parent_req, "entropix_prompt", None)
    if prompt is None:
        prompt = disk.Prompt.of(state.prompt_token_ids or (), state.prompt, settings.prompts)
        if state.parent_req is not None:
            state.parent_req.entropix_prompt = prompt
    sequence = disk.Finished(
        label=label["line"],
        request_id=state.external_req_id,
        index=state.request_index,
        prompt=prompt,
        token_ids=disk.compact(state.detokenizer.output_token_ids),
        finish_reason=finish_reason,
        trace=trace,
        tokenizer=getattr(state.detokenizer, "tokenizer", None),
    )
    disk.write(settings, label["counted"], sequence)
