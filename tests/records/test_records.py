"""A step's records, cut into those of each sequence; what a record becomes in Python and in JSON."""

import copy
import json
import pickle
from types import NoneType
from typing import get_args

import cloudpickle
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vllm_entropix.engine.carrier import StepRecords, by_request
from vllm_entropix.records.choice import choice_json
from vllm_entropix.records.encoding import record_values
from vllm_entropix.records.fields import all_fields, names, record_bytes
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.records.schema import ChoiceTrace, TokenEntry
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.rows.table import Told

ALTERNATIVES = 5
A, B, C, D = Told("a", True), Told("b", False), Told("c", True), Told("d", False, scored=True)
REQUESTS = {1: A, 2: B, 3: C, 5: Told("gone before", True), 6: D}


def step(slots: list[int]) -> np.ndarray:
    """A record of numbers that occur once, for each of these slots."""
    columns = 1 + len(names()) + 2 * ALTERNATIVES
    values = np.arange(len(slots) * columns, dtype=np.float32).reshape(len(slots), columns) / 7
    values[:, 0] = slots
    return values


def test_each_sequence_gets_the_bytes_of_its_rows():
    values = step([3, 0, 1, 2, 3, 4, 3, 6])  # c has three rows, two rows are nobody's
    records = by_request(values, REQUESTS)
    assert list(records) == ["c", "a", "b", "d"]
    counted = slice(1, 1 + len(names()))
    assert records["a"] == (A, 1, values[2, 1:].tobytes())
    assert records["b"] == (B, 1, values[3, counted].tobytes()), "what is only counted has no alternatives"
    assert records["c"] == (C, 3, values[[0, 4, 6], 1:].tobytes())
    assert records["d"] == (D, 1, values[7, counted].tobytes()), "nor has what is only summed up"


def test_a_step_without_alternatives():
    values = np.ascontiguousarray(step([2, 1])[:, : 1 + len(names())])
    records = by_request(values, REQUESTS)
    assert records == {"b": (B, 1, values[0, 1:].tobytes()), "a": (A, 1, values[1, 1:].tobytes())}


def test_large_slots_are_found():
    slot = 2**24 - 1
    assert list(by_request(step([slot, slot - 1]), {slot: Told("last", True)})) == ["last"]


def test_what_is_remembered_goes_with_the_last_row_of_whom_may_fork():
    forks = {1: Told("a", True, forks=True), 2: Told("b", True), 3: Told("c", True, forks=True)}
    states = torch.arange(5 * 4, dtype=torch.uint8).reshape(5, 4)
    made = StepRecords.from_device(forks, torch.from_numpy(step([3, 0, 2, 1, 3])), states)
    assert made.states_by_request() == {"c": bytes(states[4].numpy()), "a": bytes(states[3].numpy())}
    assert StepRecords.from_device(forks, torch.from_numpy(step([3]))).states_by_request() == {}


def trace_of_values(values: np.ndarray, not_kept: int = 0) -> TokenTrace:
    trace = TokenTrace(4 * values.shape[1])
    trace.extend(values.astype("<f4").tobytes(), len(values) + not_kept)
    return trace


def plain_values(tokens: int) -> np.ndarray:
    """Finite numbers, all different."""
    values = np.arange(tokens * (len(names()) + 2 * ALTERNATIVES), dtype=np.float32).reshape(tokens, -1) / 8
    values[:, names().index("regime")] = np.arange(tokens) % len(REGIMES)
    values[:, len(names()) : len(names()) + ALTERNATIVES] = np.arange(ALTERNATIVES) + 100
    return values


def test_the_models_are_made_of_the_table():
    assert tuple(TokenEntry.model_fields) == ("token_id", *names(), "alternatives")
    assert {*names(), "alternatives"} <= set(dir(trace_of_values(plain_values(1))[0]))
    kinds = {"float": float, "int": int, "bool": bool}
    for field in all_fields():
        described = TokenEntry.model_fields[field.name]
        assert described.description == field.described
        if field.is_number:
            bounded, nothing = get_args(described.annotation)
            assert (get_args(bounded)[0], nothing) == (kinds[field.dtype], NoneType)


def test_a_record_of_finite_numbers_is_these_numbers():
    values = plain_values(3)
    for token, record in enumerate(trace_of_values(values)):
        for place, name in enumerate(names()):
            if name not in ("regime", "forced", "top_k"):
                assert getattr(record, name) == values[token, place]
        assert record.regime == REGIMES[token]
        assert (record.top_k, record.forced) == (int(values[token, names().index("top_k")]), True)
        ids, probabilities = values[token, len(names()) :].reshape(2, -1)
        assert record.alternatives == tuple(zip(map(int, ids), probabilities, strict=True))


SPECIAL = st.sampled_from([np.nan, np.inf, -np.inf, -0.0, -1.0, 2.0**63, 3.4e38, 1e-45])


@given(arrays(np.float32, (3, len(names()) + 2 * ALTERNATIVES), elements=st.floats(width=32) | SPECIAL), st.integers(0, 2))
def test_any_numbers_become_json_that_the_schema_takes(values, not_kept):
    values[:, len(names()) : len(names()) + ALTERNATIVES] = np.arange(ALTERNATIVES)  # ids are whole numbers, come what may
    trace = trace_of_values(values, not_kept)
    ids = [7, 8, 9, 10, 11]
    read = json.loads(b"".join(choice_json(ids, trace)), parse_constant=pytest.fail)
    assert ChoiceTrace.model_validate(read) == ChoiceTrace.from_trace(ids, trace)
    assert read == ChoiceTrace.from_trace(ids, trace).model_dump(mode="json")
    assert read["not_kept"] == not_kept
    for entry, record, row in zip(read["tokens"], trace, values.tolist(), strict=True):
        assert json.loads(json.dumps({"token_id": entry["token_id"], **record.to_dict()}, allow_nan=False)) == entry
        for field, value in zip(all_fields(), row, strict=False):
            if field.dtype == "float":
                assert entry[field.name] == (value if np.isfinite(value) else None)


def test_a_long_trace_is_encoded_in_parts():
    trace = trace_of_values(plain_values(1000))
    parts = list(choice_json(range(1000), trace))
    assert max(map(len, parts)) < 128 * 1000
    assert len(json.loads(b"".join(parts))["tokens"]) == 1000


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda trace: trace[:],
        lambda trace: cloudpickle.loads(cloudpickle.dumps(trace)),
        *(lambda trace, protocol=protocol: pickle.loads(pickle.dumps(trace, protocol)) for protocol in range(2, 6)),
    ],
)
def test_a_trace_is_a_value(copied):
    trace = trace_of_values(plain_values(4), not_kept=2)
    other = copied(trace)
    assert other == trace
    assert list(other) == list(trace)
    trace.extend(trace.values()[:1].tobytes(), 1)
    assert (len(trace), len(other), other.not_kept) == (5, 4, 2)
    assert other != trace


def test_slices_of_a_trace_are_traces():
    trace = trace_of_values(plain_values(600), not_kept=3)
    records = list(trace)
    for part in (slice(0, 2), slice(2, None), slice(-1, None), slice(5, 5), slice(700, 900)):
        assert list(trace[part]) == records[part]
    assert (trace[:599].not_kept, trace[2:].not_kept) == (0, 3)
    assert (trace[-1], trace[0]) == (records[-1], records[0])
    for index in (600, -601):
        with pytest.raises(IndexError):
            trace[index]
    with pytest.raises(ValueError, match="follow one another"):
        trace[::2]


def test_a_trace_without_alternatives():
    trace = TokenTrace()
    trace.extend(plain_values(2)[:, : len(names())].tobytes(), 2)
    assert 4 * len(names()) == record_bytes()
    assert [record.alternatives for record in trace] == [(), ()]
    assert record_values(trace.values()[:0]) == []
