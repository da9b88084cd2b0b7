"""What is given to Ray of our metrics; that it arrives there is tested on a real Ray Serve, in tests/ray/test_serve.py."""

import subprocess
import sys
import time
from collections import defaultdict

import pytest
from prometheus_client import REGISTRY

from vllm_entropix.observability import prometheus, ray_metrics


class Counters:
    """Takes what Ray's would, and refuses what it would."""

    def __init__(self):
        self.values = defaultdict(float)
        self.down = False

    def __call__(self, kind, name, description, tag_keys):
        counters = self

        class Counter:
            def inc(self, value, tags):
                if counters.down:
                    raise RuntimeError("the agent is gone")
                assert value > 0
                assert tuple(tags) == tag_keys
                assert "".join(tags.values()).isascii()
                assert kind in ("counter", "histogram")
                counters.values[name, tags.get("regime"), tags.get("le"), tags["ReplicaId"]] += value

            def set(self, value, tags):
                if counters.down:
                    raise RuntimeError("the agent is gone")
                assert kind == "gauge"
                counters.values[name, None, None, tags["ReplicaId"]] = value

        assert description
        assert description.isascii()
        return Counter()


@pytest.fixture
def counters():
    return Counters()


@pytest.fixture
def exporter(counters):
    made = ray_metrics.Exporter("r1", counters)
    made.export()  # what other tests have counted
    counters.values.clear()
    return made


def test_all_that_grew_is_given_once(exporter, counters):
    metrics = prometheus._counting().metrics
    metrics.tokens.labels("HEHV").inc(3)
    for value in (0.3, 7.25):
        metrics._histograms["entropy"].observe(value)
    for _ in range(2):
        exporter.export()
    metrics.tokens.labels("HEHV").inc(2)
    exporter.export()
    values = counters.values
    assert values["entropix_tokens", "HEHV", None, "r1"] == 5
    assert values["entropix_entropy_bits_count", None, None, "r1"] == 2
    assert values["entropix_entropy_bits_sum", None, None, "r1"] == pytest.approx(7.55)
    borders = ("0.25", "0.5", "6.0", "8.0", "+Inf")
    buckets = [values["entropix_entropy_bits_bucket", None, le, "r1"] for le in borders]
    assert buckets == pytest.approx([0, 1, 1, 2, 2])


def test_what_counts_nothing_yet_is_there(counters):
    ray_metrics.Exporter("r2", counters).export()
    for name in ("trace_lines_dropped", "forced_tokens", "logits_only_tokens", "entropy_bits_count"):
        assert counters.values[f"entropix_{name}", None, None, "r2"] == pytest.approx(
            REGISTRY.get_sample_value(f"entropix_{name}" + ("" if name.endswith("count") else "_total"))
        )
        assert (f"entropix_{name}", None, None, "r2") in counters.values


def test_a_label_that_is_no_ascii_stops_no_other(exporter, counters):
    prometheus.count_request("größe", greedy=False)
    prometheus._counting().metrics.tokens.labels("HEHV").inc(1)
    exporter.export()
    given = REGISTRY.get_sample_value("entropix_requests_total", {"preset": "größe", "greedy": "no"})
    assert [value for (name, *_), value in counters.values.items() if name == "entropix_requests"] == [given]
    assert counters.values["entropix_tokens", "HEHV", None, "r1"] == 1


def test_ours_alone_and_what_can_fall_is_a_gauge(exporter):
    names = {name for (name, _), *_ in ray_metrics._numbers()}
    assert all(name.startswith("entropix_") and not name.endswith(("_created", "_total")) for name in names)
    kinds = {metric.type for metric in REGISTRY.collect() if metric.name.startswith("entropix_")}
    assert kinds == {"counter", "gauge", "histogram"}


def test_a_gauge_rises_and_falls(exporter, counters):
    series = "entropix_branches_live", None, None, "r1"
    for more, live in ((3, 3), (-2, 1), (-1, 0)):
        prometheus.count_live_branches(more)
        exporter.export()
        assert counters.values[series] == live


def test_what_ray_did_not_take_is_given_later(counters, monkeypatch):
    monkeypatch.setattr(ray_metrics, "EXPORT_SECONDS", 0.01)
    counters.down = True
    exporter = ray_metrics.Exporter("r1", counters)
    background = exporter._background
    exporter.start()
    deadline = time.monotonic() + 20
    prometheus._counting().metrics.tokens.labels("LEHV").inc(4)
    while background.failures < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert counters.values == {}
    counters.down = False
    given = "entropix_tokens", "LEHV", None, "r1"
    while given not in counters.values:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    prometheus._counting().metrics.tokens.labels("LEHV").inc(4)
    expected = REGISTRY.get_sample_value("entropix_tokens_total", {"regime": "LEHV"})
    while counters.values[given] < expected:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert counters.values[given] == expected
    # For good, so the thread is left something that does nothing.
    monkeypatch.setattr(exporter, "export", lambda: time.sleep(3600))


def test_outside_of_rays_actors_nothing_is_given_and_ray_is_not_imported():
    script = """
import sys, threading
from vllm_entropix.observability import prometheus
prometheus.count_request("off", greedy=False)
assert "ray" not in sys.modules
import ray
from vllm_entropix.observability import ray_metrics
ray_metrics.start_in_actors()
assert [thread.name for thread in threading.enumerate() if "ray" in thread.name] == []
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_rays_own_counters_take_all_descriptions():
    script = """
from vllm_entropix.observability import prometheus, ray_metrics
prometheus.count_request("größe", greedy=False)
ray_metrics.Exporter("r1").export()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
