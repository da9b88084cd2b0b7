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
# Attribute of ModelRunnerOutput that holds them.
RECORDS = "entropix_records"
# Keys in kv_transfer_params, the one field of EngineCoreOutput that takes any plugin's data, for records that are kept, counted
# and summed up. They never leave the frontend: bytes there would break the HTTP response.
TRACED, COUNTED, SCORED = "entropix_traced", "entropix_counted", "entropix_scored"
# Comes with the first record of a sequence that is to be written to disk: what its line says of the engine.
WRITTEN = "entropix_written"
# Comes with the records that are summed up, of a sequence that abstains beyond a bound: score, above and below.
ABSTAINS = "entropix_abstains"
OURS = frozenset({TRACED, COUNTED, SCORED, WRITTEN, ABSTAINS})


@dataclass
class StepRecords:
    """Trace records of some rows of a step, on their way to the host.

    Attributes:
        requests: slot → what its records are for.
        values: float32 ``[rows, columns]`` on the host: slot (0 for rows to skip), record, alternatives. Complete once
            ``ready`` has returned.
        ready: waits for the copy.
    """

    requests: dict[int, Told]
    values: Tensor
    ready: Callable[[], None]

    @classmethod
    def from_device(cls, requests: dict[int, Told], values: Tensor) -> StepRecords:
        """Send values that are still on a device on their way, without waiting for it."""
        if values.device.type == "cpu":
            return cls(requests, values, _nothing_to_wait_for)
        # Pinned memory, and an event that is waited for where the output is completed.
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return cls(requests, on_host, event.synchronize)

    def by_request(self) -> Records:
        """Each sequence's records, one after the other; without alternatives unless it is traced."""
        self.ready()
        return by_request(self.values.numpy(), self.requests)


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


def _joined(parts: list[StepRecords]) -> Records:
    """Records by request id; a step's batch may have been sampled in several parts, each with whole sequences."""
    return {request_id: records for part in parts for request_id, records in part.by_request().items()}


def attach_to_step(output: Any, parts: list[StepRecords]) -> Any:
    """A step's ModelRunnerOutput with its records, once it is complete."""
    if not hasattr(output, "get_output"):
        setattr(output, RECORDS, _joined(parts))
        return output
    # Asynchronous scheduling: the output is completed later, in another thread.
    original = output.get_output

    def get_output() -> Any:
        result = original()
        setattr(result, RECORDS, _joined(parts))
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
