"""Counting goes on, whatever one count raises."""

import time

import numpy as np
import pytest
from prometheus_client import REGISTRY

from vllm_entropix.observability import background, prometheus
from vllm_entropix.records.fields import names
from vllm_entropix.records.scores import SCORES, Tally


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


def test_forks_are_counted():
    def numbers():
        series = [("entropix_forks_total", {}), ("entropix_branches_live", {})]
        series += [("entropix_fork_tokens_total", {"kind": kind}) for kind in ("committed", "pruned")]
        return [REGISTRY.get_sample_value(*one) or 0 for one in series]

    before = numbers()
    prometheus.count_fork()
    prometheus.count_live_branches(3)
    prometheus.count_live_branches(-1)
    prometheus.count_forked_answer(committed=7, pruned=4)
    assert [after - number for after, number in zip(numbers(), before, strict=True)] == [1, 2, 7, 4]
    prometheus.count_live_branches(-2)


def test_scores_are_counted_where_they_are_known():
    def number(name):
        return REGISTRY.get_sample_value(name) or 0

    nothing = Tally().values()
    prometheus.count_answer(nothing)
    before = {score.metric_name: number(f"{score.metric_name}_count") for score in SCORES}
    abstained = number("entropix_abstained_answers_total")
    prometheus.count_answer({**nothing, "entropy_mean": 1.2, "perplexity": 3.5, "abstained": True})
    prometheus.count_answer({**nothing, "entropy_mean": 0.2, "abstained": False})
    counted = {name: number(f"{name}_count") - value for name, value in before.items() if number(f"{name}_count") != value}
    assert counted == {"entropix_answer_entropy_mean_bits": 2, "entropix_answer_perplexity": 1}
    assert number("entropix_abstained_answers_total") == abstained + 1
    # Names that Prometheus takes, and that Ray does: no square in them.
    assert all(score.metric_name.isascii() and score.metric_name.isidentifier() for score in SCORES)
