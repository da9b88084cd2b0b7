"""`vllm-entropix whatif`: the regimes of traced tokens under other thresholds."""

import json

import pytest
from typer.testing import CliRunner

from tests.support.traces import CONFIG, line, varied, written
from vllm_entropix.cli.main import app
from vllm_entropix.observability.whatif import transitions
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError

WIDER = EntropixConfig.preset(thresholds={"helv": {"varentropy_below": 4.5}, "lelv": {"varentropy_below": 0.01}})


def test_the_same_thresholds_change_nothing():
    found = transitions([line(["a"] * 50), line(["b"] * 25)], CONFIG)
    assert found.tokens == 75
    assert found.changed == 0
    assert found.before == found.after == dict.fromkeys(REGIMES, 15)


def test_other_thresholds_move_the_tokens_between_the_borders():
    # Entropy 6 with varentropy 3: only a wider HELV has it. Entropy 0.02 with varentropy 0.05: only a wider LELV has it.
    found = transitions([line(["a"] * 6, metrics=[(6.0, 3.0), (0.02, 0.05), (6.0, 9.0)])], WIDER)
    rows = found.to_dict()["transitions"]
    assert rows["ADAPTIVE"] == {"LELV": 0, "HELV": 2, "LEHV": 0, "HEHV": 0, "ADAPTIVE": 0}
    assert rows["LELV"] == {"LELV": 0, "HELV": 0, "LEHV": 0, "HEHV": 0, "ADAPTIVE": 2}
    assert rows["HEHV"]["HEHV"] == 2
    assert found.changed == 4
    assert found.after == {"LELV": 0, "HELV": 2, "LEHV": 0, "HEHV": 2, "ADAPTIVE": 2}


def test_what_was_not_measured_is_adaptive():
    found = transitions([line(["a"], metrics=[(None, None)])], WIDER)
    assert found.after["ADAPTIVE"] == found.before["ADAPTIVE"] == 1


def test_traces_without_tokens_are_refused():
    with pytest.raises(ConfigError, match="no tokens"):
        transitions([line([])], CONFIG)


def test_the_command(tmp_path):
    path = str(written(tmp_path / "traces.jsonl", line(["a"] * 20), varied(100, 1)))
    settings = tmp_path / "mine.toml"
    settings.write_text("[thresholds.helv]\nvarentropy_below = 4.5\n")
    run = CliRunner().invoke
    answered = run(app, ["whatif", path, path, "--preset", str(settings), "--json"])
    assert answered.exit_code == 0, answered.output
    data = json.loads(answered.stdout)
    assert data["tokens"] == 240
    assert sum(data["before"].values()) == sum(data["after"].values()) == 240
    assert sum(sum(row.values()) for row in data["transitions"].values()) == 240
    shown = run(app, ["whatif", path, "--sampler-config", '{"thresholds": {"lehv": {"varentropy_above": 1.0}}}'])
    assert shown.exit_code == 0, shown.output
    for word in ("Shares of the regimes", "From (rows) to (columns)", "120 tokens change", *REGIMES):
        assert word in " ".join(shown.stdout.split())
