"""What the files of deploy/observability ask of a server's /metrics."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "observability"
DASHBOARD = FOLDER / "grafana-dashboard.json"
ALERTS = FOLDER / "alerts.yml"
_NAME = re.compile(r"\b(?:entropix_|vllm:)\w+")


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels, without the rows that part them."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Every PromQL expression by where it stands, with Grafana's variables replaced."""
    found = {}
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*")
            found[f"{panel['title']} {target['refId']}"] = expression
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            found[rule["alert"]] = rule["expr"]
    return found


def metric_names() -> set[str]:
    """All metrics that are named."""
    return {name for expression in expressions().values() for name in _NAME.findall(expression)}
