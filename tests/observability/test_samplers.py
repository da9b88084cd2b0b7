"""`vllm-entropix samplers`: what there is, with settings and what requests call them; refused ones with their reason."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.observability.test_presets import in_a_terminal
from vllm_entropix.cli import checks
from vllm_entropix.cli.doctor import _settings
from vllm_entropix.cli.main import app
from vllm_entropix.samplers import chain, registry


def run(*arguments):
    ended = CliRunner().invoke(app, ["samplers", *arguments])
    if ended.exception is not None:
        raise ended.exception
    return ended.output


@pytest.fixture
def refused(monkeypatch):
    """An installed package registers a sampler that isn't one."""
    entry = importlib.metadata.EntryPoint("tidy", "collections:OrderedDict", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    registry.registry.cache_clear()
    yield "the sampler tidy of the package collections:OrderedDict can't be used: "
    monkeypatch.undo()
    registry.registry.cache_clear()


def test_every_sampler_with_its_settings():
    told = run()
    assert "entropix (default): Regimes by uncertainty" in told
    for name in registry.names():
        assert re.search(rf"^{name}( \(default\))?: \S", told, re.MULTILINE)
    assert re.search(r"^ +min_p\.min_p +0\.05 +min_p +Smallest .* \[0, 1\] ratio$", told, re.MULTILINE)
    assert re.search(r"^ +top_n_sigma\.top_n_sigma +1\.0 +top_n_sigma +How far .* standard deviations$", told, re.MULTILINE)


def test_markdown():
    told = run("--markdown")
    assert "| `top_n_sigma.top_n_sigma` | 1.0 | standard deviations | [-1, 100] | `top_n_sigma` | How far" in told
    widths = [line.count("|") for line in told.splitlines() if line]
    assert widths == sorted(widths)  # two tables, each with as many cells in every line


def test_the_table_of_chains_is_the_documentations():
    text = (Path(__file__).parents[2] / "docs/samplers.md").read_text(encoding="utf-8")
    table = text.partition("<!-- vllm-entropix samplers --chain -->\n")[2].partition("<!-- end -->")[0]
    assert table == run("--chain")
    lines = table.splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == list(chain.names())
    assert {line.count("|") for line in lines} == {8}


def test_it_can_be_read_on_eighty_columns():
    lines = [line.rstrip() for line in in_a_terminal(command="samplers").splitlines()]
    assert max(map(len, lines)) <= 80
    [at] = [number for number, line in enumerate(lines) if line[2:].split()[:1] == ["top_n_sigma.top_n_sigma"]]
    assert lines[at].split() == ["top_n_sigma.top_n_sigma", "1.0", "top_n_sigma"]
    assert lines[at + 1].startswith("      How far")


def test_what_was_refused_says_why(refused):
    assert f"refused: {refused}" in run()
    assert f"| `tidy` | refused: {refused}" in run("--markdown")
    [check] = [check for check in checks.samplers() if check.name == "tidy"]
    assert check.state == "note"
    assert check.detail.startswith(refused)
    wanted = _settings('{"sampler": "tidy"}')
    assert isinstance(wanted, checks.Check)
    assert wanted.detail.startswith(refused)


def test_doctor_takes_the_sections_of_samplers():
    assert _settings('{"sampler": "min_p", "min_p": {"min_p": 0.2}}') == {"sampler": "min_p", "min_p": {"min_p": 0.2}}
    told = _settings('{"min_p": {"min_p": 2}}')
    assert isinstance(told, checks.Check)
    assert "min_p.min_p is 2" in told.detail
