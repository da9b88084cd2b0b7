"""Carries records of tokens from the worker to the frontend.

worker: an attribute on ModelRunnerOutput → scheduler: bytes in each EngineCoreOutput's ``kv_transfer_params``, beside its token
→ frontend, which takes them out (see ``scheduler`` and ``frontend``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.records.fields import record_bytes
from vllm_entropix.rows.table import Told

# Request id → (what they are for, rows, their records one after the other).
Records = dict[str, tuple[Told, int, bytes]]
# Attributes of ModelRunnerOutput: records, and request id → what is remembered of a sequence that may fork.
RECORDS, STATES = "entropix_records", "entropix_states"
# Keys in kv_transfer_params, the one field of EngineCoreOutput that takes any plugin's data, for records that are kept, counted
# and summed up. They never leave the frontend: bytes there would break the HTTP response.
TRACED, COUNTED, SCORED = "entropix_traced", "entropix_counted", "entropix_scored"
# Comes with the first record of a sequence that is to be written to disk: what its line says of the engine.
WRITTEN = "entropix_written"
# Comes with the records that are summed up, of a sequence that abstains beyond a bound: score, above and below.
ABSTAINS = "entropix_abstains"
# Comes with traced records of a sequence that may fork: what its samplers remember of it, as bytes.
STATE = "entropix_state"
OURS = frozenset({TRACED, COUNTED, SCORED, WRITTEN, ABSTAINS, STATE})


@dataclass
class StepRecords:
    """Trace records of some rows of a step, on their way to the host.

    Attributes:
        requests: slot → what its records are for.
        values: float32 ``[rows, columns]`` on the host: slot (0 for rows to skip), record, alternatives. Complete once
            ``ready`` has returned.
        ready: waits for the copy.
        states: uint8 ``[rows, bytes]`` on the host, what is remembered of each row's sequence; None: nothing is to be told.
    """

    requests: Mapping[int, Told]
    values: Tensor
    ready: Callable[[], None]
    states: Tensor | None = None

    @classmethod
    def from_device(cls, requests: Mapping[int, Told], values: Tensor, states: Tensor | None = None) -> StepRecords:
        """Send values that are still on a device on their way, without waiting for it."""
        if values.device.type == "cpu":
            return cls(requests, values, _nothing_to_wait_for, states)
        on_host = _on_its_way(values)
        states = None if states is None else _on_its_way(states)
        # An event that is waited for where the output is completed.
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(requests, on_host, event.synchronize, states)

    def by_request(self) -> Records:
        """Each sequence's records, one after the other; without alternatives unless it is traced."""
        self.ready()
        return by_request(self.values.numpy(), self.requests)

    def states_by_request(self) -> dict[str, bytes]:
        """What is remembered of each sequence that may fork, as of its last row."""
        if self.states is None:
            return {}
        self.ready()
        rows = {slot: row for row, slot in enumerate(self.values[:, 0].tolist()) if slot}
        told = {slot: self.requests.get(slot) for slot in rows}  # a whole number as a float finds the integer's entry
        states = self.states.numpy()
        return {one.request_id: states[rows[slot]].tobytes() for slot, one in told.items() if one is not None and one.forks}


def by_request(values: np.ndarray, requests: Mapping[int, Told]) -> Records:
    """Each sequence's records, one after the other; without alternatives unless it is traced.

    Args:
        values: float32 ``[rows, columns]``: slot (0 for rows to skip), record, alternatives.
        requests: slot → what its records are for.
    """
    # Cut out of one string: an array's own indexing takes longer than all else here, and this runs in every step.
    data = values[:, 1:].tobytes()
    width, counted_width = 4 * (values.shape[1] - 1), record_bytes()
    found: Records = {}
    for row, slot in enumerate(values[:, 0].tolist()):
        known = requests.get(slot) if slot else None  # a whole number as a float finds the integer's entry
        if known is None:
            continue
        begin = row * width
        record = data[begin : begin + (width if known.traced else counted_width)]
        before = found.get(known.request_id)
        found[known.request_id] = (known, 1, record) if before is None else (known, before[1] + 1, before[2] + record)
    return found


def _on_its_way(values: Tensor) -> Tensor:
    """A copy in the host's pinned memory, complete once the device has come so far."""
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return on_host.copy_(values, non_blocking=True)


def _attach(output: Any, parts: list[StepRecords]) -> None:
    """Hang records and states on a ModelRunnerOutput; a batch may have been sampled in parts, each with whole sequences."""
    setattr(output, RECORDS, {request_id: records for part in parts for request_id, records in part.by_request().items()})
    states = {request_id: state for part in parts for request_id, state in part.states_by_request().items()}
    if states:
        setattr(output, STATES, states)


def attach_to_step(output: Any, parts: list[StepRecords]) -> Any:
    """A step's ModelRunnerOutput with its records, once it is complete."""
    if not hasattr(output, "get_output"):
        _attach(output, parts)
        return output
    # Asynchronous scheduling: the output is completed later, in another thread.
    original = output.get_output

    def get_output() -> Any:
        result = original()
        _attach(result, parts)
        return result

    output.get_output = get_output
    return output


def attach_to_sequence(output: Any, carried: dict[str, Any]) -> None:
    """Put a sequence's records of a step into its EngineCoreOutput, beside what others carry there."""
    others = output.kv_transfer_params
    output.kv_transfer_params = {**others, **carried} if others else carried


def without_ours(params: dict[str, Any]) -> dict[str, Any] | None:
    """kv_transfer_params as they were before :func:`attach_to_sequence`."""
    return {key: value for key, value in params.items() if key not in OURS} or None


def _nothing_to_wait_for() -> None:
    """The records are on the host already."""
