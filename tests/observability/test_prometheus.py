"""Counting goes on, whatever one count raises."""

import time

import numpy as np
import pytest

from vllm_entropix.observability import background, prometheus
from vllm_entropix.records.fields import names


class Panic(BaseException):
    """What Rust's panics are in Python."""


@pytest.fixture
def counting(monkeypatch):
    """Counters that this test alone has, and what they were given."""
    given = []

    class Metrics:
        def count(self, records):
            given.append(len(records))
            if len(given) <= 2:
                raise self.error("not now")

    monkeypatch.setattr(prometheus, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(prometheus, "_Metrics", Metrics)
    return prometheus._Counting(), Metrics, given


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError, SystemExit, Panic])
def test_the_thread_of_the_counters_survives(counting, monkeypatch, error):
    counters, metrics, given = counting
    metrics.error = error
    told = []
    monkeypatch.setattr(background.logger, "error", lambda text, *values: told.append(text % values))
    record = np.zeros((1, len(names())), dtype="<f4").tobytes()
    for expected in range(1, 5):
        counters.add(record, 1)
        deadline = time.monotonic() + 20
        while len(given) < expected and time.monotonic() < deadline:
            time.sleep(0.005)
    assert given == [1, 1, 1, 1]
    assert counters.background.failures == 2
    assert len(told) == 1
    assert f"entropix-metrics goes on after {error.__name__}: not now" in told[0]


def test_records_that_are_no_records_cost_their_own_count(counting, monkeypatch):
    counters, _, given = counting
    given += [0, 0]  # nothing else fails
    monkeypatch.setattr(background.logger, "error", lambda *_: None)
    counters.add(b"123", 1)
    counters.add(np.zeros((2, len(names())), dtype="<f4").tobytes(), 2)
    deadline = time.monotonic() + 20
    while not counters.background.failures and time.monotonic() < deadline:
        time.sleep(0.005)
    counters.add(np.zeros((3, len(names())), dtype="<f4").tobytes(), 3)
    while len(given) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert sum(given) == 5
