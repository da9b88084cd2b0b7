"""deploy/observability: Prometheus' own tool takes its files, and every metric they name is exported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support import dashboards, prometheus
from tests.support.dashboards import ALERTS, DASHBOARD, FOLDER

RULE_TESTS = Path(__file__).with_name("alerts.test.yml")


@pytest.fixture(scope="session")
def promtool(tmp_path_factory):
    return prometheus.program("promtool", tmp_path_factory.mktemp("prometheus"))


def check(promtool, *arguments, cwd=FOLDER):
    ended = subprocess.run([promtool, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_prometheus_takes_its_files(promtool):
    for name in ("prometheus.yml", "prometheus-ray.yml"):
        check(promtool, "check", "config", name)
    check(promtool, "check", "rules", ALERTS.name)


def test_alerts_fire_when_they_should(promtool, tmp_path):
    for path in (ALERTS, RULE_TESTS):
        shutil.copy(path, tmp_path)
    check(promtool, "test", "rules", RULE_TESTS.name, cwd=tmp_path)
    tested = {
        rule["alertname"]
        for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]
        for rule in test["alert_rule_test"]
        if rule.get("exp_alerts")
    }
    rules = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    assert tested == rules


def test_prometheus_takes_the_dashboards_expressions(promtool, tmp_path):
    rules = [{"record": f"panel_{number}", "expr": text} for number, text in enumerate(dashboards.expressions().values())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    check(promtool, "check", "rules", "rules.yml", cwd=tmp_path)


def test_panels_lie_side_by_side():
    taken = set()
    for panel in dashboards.panels():
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["description"]
        assert panel["targets"]
    assert "${datasource}" in DASHBOARD.read_text()


def test_every_metric_of_ours_that_is_named_is_exported():
    """That of vLLM's, too, a real server says: tests/engine/test_trace_files.py."""
    script = """
from prometheus_client import generate_latest
from vllm_entropix.observability import prometheus
prometheus.count_request("jax-2024-10", greedy=False)
print(generate_latest().decode())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    exported = {line.partition("{")[0].partition(" ")[0] for line in ended.stdout.splitlines() if not line.startswith("#")}
    named = {name for name in dashboards.metric_names() if name.startswith("entropix_")}
    assert named - exported == set()
    ours = {name for name in exported if name.startswith("entropix_") and not name.endswith(("_created", "_sum", "_count"))}
    assert ours - named == set(), "not on the dashboard"
