"""A step's records, cut into those of each sequence."""

import numpy as np

from vllm_entropix.engine.outputs import by_request
from vllm_entropix.sampling.batch import RECORD_FIELDS

ALTERNATIVES = 5
REQUESTS = {1: ("a", True), 2: ("b", False), 3: ("c", True), 5: ("gone before", True)}


def step(slots: list[int]) -> np.ndarray:
    """A record of numbers that occur once, for each of these slots."""
    columns = 1 + len(RECORD_FIELDS) + 2 * ALTERNATIVES
    values = np.arange(len(slots) * columns, dtype=np.float32).reshape(len(slots), columns) / 7
    values[:, 0] = slots
    return values


def test_each_sequence_gets_the_bytes_of_its_rows():
    values = step([3, 0, 1, 2, 3, 4, 3])  # c has three rows, two rows are nobody's
    records = by_request(values, REQUESTS)
    assert list(records) == ["c", "a", "b"]
    counted = slice(1, 1 + len(RECORD_FIELDS))
    assert records["a"] == (True, 1, values[2, 1:].tobytes())
    assert records["b"] == (False, 1, values[3, counted].tobytes()), "what is only counted has no alternatives"
    assert records["c"] == (True, 3, values[[0, 4, 6], 1:].tobytes())


def test_a_step_without_alternatives():
    values = np.ascontiguousarray(step([2, 1])[:, : 1 + len(RECORD_FIELDS)])
    records = by_request(values, REQUESTS)
    assert records == {"b": (False, 1, values[0, 1:].tobytes()), "a": (True, 1, values[1, 1:].tobytes())}


def test_large_slots_are_found():
    slot = 2**24 - 1
    assert list(by_request(step([slot, slot - 1]), {slot: ("last", True)})) == ["last"]
