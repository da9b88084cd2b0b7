"""Lines of trace files of version 1, which a server wrote, are read by whatever reads version 2."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.traces import line, written
from vllm_entropix.cli.main import app
from vllm_entropix.observability.export import to_pandas
from vllm_entropix.observability.tracefile import TraceFileError, read_traces
from vllm_entropix.records.line import SamplerPart, TraceLine
from vllm_entropix.samplers.entropix.record import EntropixPart

RECORDED = Path(__file__).resolve().parents[1] / "data" / "traces-version-1.jsonl"


def test_what_stood_beside_everything_else_is_the_samplers():
    values = [json.loads(text) for text in RECORDED.read_text().splitlines()]
    lines = list(read_traces(RECORDED))
    assert {old["version"] for old in values} == {1}
    assert {read.sampler.preset for read in lines} == {"jax-2024-10", "torch-2024-10"}
    for old, read in zip(values, lines, strict=True):
        new = read.model_dump(mode="json")
        assert new.pop("sampler") == {
            "name": "entropix",
            **{name: old.pop(name) for name in ("preset", "fidelity", "thresholds")},
        }
        # What came later than version 1 is null.
        assert [new.pop(name) for name in ("scores", "branch", "forks")] == [None] * 3
        for entry, before in zip(new["records"], old["records"], strict=True):
            assert {entry.pop(name) for name in entry.keys() - before.keys()} <= {None}
        assert new == {**old, "version": 2}
        assert TraceLine.model_validate_json(read.model_dump_json()) == read


def test_every_reader_takes_both(tmp_path):
    now = written(tmp_path / "now.jsonl", *read_traces(RECORDED))
    assert '"version":2' in now.read_text()
    assert to_pandas(RECORDED).equals(to_pandas(now))
    assert set(to_pandas(RECORDED).preset) == {"jax-2024-10", "torch-2024-10"}
    answers = []
    for path in (RECORDED, now):
        commands = (["whatif", str(path), "--preset", "torch-2024-10"], ["report", str(path), "--terminal"])
        ended = [CliRunner().invoke(app, command) for command in commands]
        assert [each.exit_code for each in ended] == [0, 0]
        answers.append([each.stdout.replace(path.name, "") for each in ended])
    assert answers[0][0] == answers[1][0]
    assert all("torch-2024-10, corrected" in told for _, told in answers)


def test_a_line_without_settings_tells_no_sampler():
    old = json.loads(line(["a"]).model_dump_json()) | {"version": 1}
    old.pop("sampler")
    assert TraceLine.model_validate(old).sampler is None


@pytest.mark.parametrize("name", ["entropix", "another"])
def test_a_sampler_tells_what_it_likes_and_entropix_what_it_has(tmp_path, name):
    text = line(["a"], metrics=[(0.5, 0.5)]).model_dump_json()
    told = json.dumps({"name": name, "thresholds": "none", "preset": 3})
    path = tmp_path / "traces.jsonl"
    path.write_text(text.replace(line(["a"]).sampler.model_dump_json(), told))
    assert told in path.read_text()
    if name == "entropix":
        with pytest.raises(TraceFileError, match="not a trace: sampler"):
            list(read_traces(path))
        return
    [read] = read_traces(path)
    assert type(read.sampler) is SamplerPart
    assert json.loads(read.model_dump_json())["sampler"] == json.loads(told)
    assert (read.of_sampler("preset", str), read.of_sampler("preset", int)) == (None, 3)
    [row] = to_pandas(path).itertuples()
    assert (row.sampler, row.preset) == ("another", None) or row.preset != row.preset
    output = tmp_path / "out.html"
    assert CliRunner().invoke(app, ["report", str(path), "-o", str(output)]).exit_code == 0
    assert CliRunner().invoke(app, ["report", str(path), "--terminal"]).exit_code == 0


def test_the_part_says_what_the_settings_are():
    part = line(["a"]).sampler
    assert isinstance(part, EntropixPart)
    assert (part.name, part.preset, part.fidelity) == ("entropix", "jax-2024-10", "corrected")
