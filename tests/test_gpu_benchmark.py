"""``benchmarks.gpu``: its processes keep to their limits, what they find stays, and a dry run passes."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import tables as document_tables
from benchmarks.gpu import engines, run, steps, tables
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.findings import BARS, Findings
from benchmarks.gpu.results import Results
from benchmarks.gpu.steps import Job, Measurement, Step, Wishes
from tests.support.processes import ends
from vllm_entropix.engine import switch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_jobs(tmp_path, monkeypatch):
    """Runs Python programs as a step's processes: (run, did they succeed?)."""

    def run_them(*programs, limit=30.0, **options):
        jobs = [program if isinstance(program, Job) else Job(f"job-{i}", ("-c", program)) for i, program in enumerate(programs)]
        monkeypatch.setattr(run, "jobs_of", lambda *_: jobs)
        monkeypatch.setitem(steps.STEPS, "trial", Step("a trial", limit, 1))
        made = run.Run(tmp_path, say=lambda _: None, **options)
        return made, made.step("trial")

    return run_them


def statuses(made):
    return {one["job"]: one["status"] for one in Findings(made.results.lines()).ended()}


def test_processes_of_a_step_run_side_by_side(run_jobs, tmp_path):
    meets = "from pathlib import Path\nimport time\nPath({mine!r}).touch()\n"
    meets += "while not Path({other!r}).exists(): time.sleep(0.01)"
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    made, succeeded = run_jobs(meets.format(mine=one, other=other), meets.format(mine=other, other=one))
    assert succeeded
    assert statuses(made) == {"job-0": 0, "job-1": 0}


def test_a_limit_ends_a_process_and_its_children_alone(run_jobs, tmp_path):
    pid = tmp_path / "pid"
    child = "import time; time.sleep(600)"
    hangs = f"import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    hangs += f"open({str(pid)!r}, 'w').write(str(p.pid))\nprint('began', flush=True)\ntime.sleep(600)"
    made, succeeded = run_jobs(hangs, "pass", limit=2.0)
    assert not succeeded
    assert statuses(made) == {"job-0": "late", "job-1": 0}
    assert (tmp_path / "logs" / "job-0.log").read_text() == "began\n"
    assert ends(int(pid.read_text())), "what was started still runs"


def test_what_a_process_has_found_stays_if_it_dies(run_jobs, tmp_path):
    dies = "import os, sys\nfrom pathlib import Path\nfrom benchmarks.gpu.results import Results\n"
    dies += f"Results(Path({str(tmp_path / 'results.jsonl')!r})).add('job-0', part='x', value=1)\nos.kill(os.getpid(), 9)"
    made, succeeded = run_jobs(dies)
    assert not succeeded
    assert made.results.lines()[0] == {"job": "job-0", "part": "x", "value": 1}
    assert statuses(made) == {"job-0": -9}


def test_a_cut_line_is_left_out(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add("one", value=1)
    with results.file.open("a") as file:
        file.write('{"job": "tw')
    assert results.lines() == [{"job": "one", "value": 1}]


def test_time_and_failed_steps_keep_others_from_beginning(run_jobs, monkeypatch):
    made, _ = run_jobs("raise SystemExit(3)")
    monkeypatch.setitem(steps.STEPS, "needy", Step("needs it", 10, 1, ("trial",)))
    monkeypatch.setitem(steps.STEPS, "long", Step("takes long", 100, 60))
    made.budget = 5.0
    assert not made.step("needy")
    assert not made.step("long")
    ended = {one["job"]: one for one in Findings(made.results.lines()).ended()}
    assert ended["job-0"]["status"] == 3
    assert ended["needy"]["why"] == "trial failed"
    assert ended["long"]["status"] == "skipped"
    assert "left of 5" in ended["long"]["why"]


def test_what_a_measurement_raises_is_a_finding(tmp_path):
    file = tmp_path / "results.jsonl"
    options = json.dumps({"side": "nobody", "requests": [1], "rounds": 1, "dry": True})
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "trial", "throughput", options, str(file)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 1
    error, took = Results(file).lines()
    assert error["error"] == "KeyError: 'nobody'"
    assert "benchmarks/gpu/throughput.py" in error["where"]
    assert took["took"] >= 0


def test_a_report_of_pytest_is_read(run_jobs, tmp_path):
    test = tmp_path / "test_it.py"
    test.write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('rows', 3)\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='not here')\ndef test_left_out(): pass\n"
    )
    report = tmp_path / "report.xml"
    options = ("-q", "-p", "no:cacheprovider", "-c", "/dev/null", f"--junitxml={report}")
    made, succeeded = run_jobs(Job("tests", ("-m", "pytest", str(test), *options), report=report))
    assert not succeeded
    read = made.results.lines()[0]
    assert read["passed"] == 1
    assert read["told"] == [{"test": "test_good", "rows": "3"}]
    assert [one["test"] for one in read["failed"]] == ["test_bad"]
    assert read["skipped"] == [{"test": "test_left_out", "said": "not here"}]
    assert any("test_bad" in problem for problem in Findings(made.results.lines()).problems())


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("name", steps.STEPS)
def test_each_step_can_be_called(name, dry, tmp_path):
    step = steps.STEPS[name]
    assert set(step.needs) <= steps.STEPS.keys()
    assert step.least <= step.limit
    if not isinstance(step, Measurement):
        jobs = list(steps.jobs_of(name, Wishes(dry=dry), tmp_path / "results.jsonl", tmp_path))
        assert len({job.name for job in jobs}) == len(jobs) > 0
        return
    measure = importlib.import_module(f"benchmarks.gpu.{step.module}").measure
    options = {**step.options, **(step.dry if dry else {}), "dry": dry}
    inspect.signature(measure).bind(lambda **_: None, **options)
    assert options.get("side", "vllm") in engines.SIDES


def test_plans_name_steps():
    assert steps.expanded(["first", "kernels"]) == list(steps.PLANS["first"])
    assert {one for plan in steps.PLANS.values() for one in plan} <= steps.STEPS.keys()
    with pytest.raises(ValueError, match="there is no step or plan 'frist'"):
        steps.expanded(["frist"])


def test_vllm_alone_is_without_the_plugin():
    assert engines.DISABLE == switch.DISABLE


def rate(side, requests, speed, decode_ms):
    sizes = {"part": "throughput", "side": side, "requests": requests, "context": 1024}
    return {"job": "rates", **sizes, "tokens_per_second": speed, "decode_ms": decode_ms}


def test_bars_say_what_was_found():
    lines = [rate("vllm", 64, 1000.0, 9.0), rate("vllm", 64, 1010.0, 9.1), rate("vllm", 64, 990.0, 9.2)]
    lines += [rate("last", 64, 990.0, 9.2), rate("trace", 64, 960.0, 9.5), rate("all", 64, 840.0, 11.0)]
    lines += [{"job": "decode-last", "part": "decode", "side": "last", "requests": 256, "host_ms": 0.2}]
    found = Findings(lines)
    verdicts = [(bar.found(found), bar.verdict(bar.found(found))) for bar in BARS]
    assert sorted((round(value, 4), verdict) for value, verdict in verdicts if value is not None) == [
        (0.2, "met"),
        (0.96, "missed"),
        (0.9882, "moonshot"),
        (0.99, "met"),
    ]
    assert {verdict for value, verdict in verdicts if value is None} == {"not measured"}


def test_the_page_names_the_bars_until_a_run_fills_them_in():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "#bars -->" in page or tables.bars(Findings([])) in page


def test_a_run_fills_a_table_of_a_document(tmp_path):
    machine = {"gpu": "H100", "torch": "2.13", "vllm": "0.32", "date": "2026-11-27"}
    results = Results(tmp_path / "gpu.jsonl")
    results.add("run", machine=machine, command="python -m benchmarks.gpu rates")
    for line in (rate("vllm", 64, 1000.0, 9.0), rate("last", 64, 990.0, 9.2)):
        results.add(**line)
    table = tables.part([results.file], "throughput")
    assert "| last, 64, 1,024 | 990 | 9.2 | 0.9900 | 0.9783 |" in table
    assert table.endswith("H100; torch 2.13, vLLM 0.32; 2026-11-27; `python -m benchmarks.gpu rates`\n")
    with pytest.raises(ValueError, match="has no results"):
        tables.part([results.file], "nothing")

    again = Results(tmp_path / "again.jsonl")
    again.add("run", machine={**machine, "vllm": "0.33"}, command="python -m benchmarks.gpu first")
    again.add("decode-last", part="decode", side="last", requests=256, host_ms=0.2)
    both = "<!-- benchmark:gpu,again#bars -->\n<!-- /benchmark -->"
    filled = document_tables.filled(both, tmp_path)
    assert "| 0.9900 | met |" in filled
    assert "| 0.2000 | met |" in filled
    assert "vLLM 0.33; 2026-11-27; `python -m benchmarks.gpu rates`, `python -m benchmarks.gpu first`\n" in filled


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["frist"], "there is no step or plan"), (["--mode", "x"], "there is no mode 'x'"), (["--list"], "throughput-last")],
)
def test_the_command_says_what_there_is(arguments, said):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(main)
    result = CliRunner().invoke(app, arguments)
    assert said in " ".join(result.output.split())
    assert result.exit_code == (0 if arguments == ["--list"] else 2)


@pytest.mark.engine
def test_a_dry_run_passes(tmp_path):
    """One step of each kind; what is left out would start more engines by the same code."""
    names = ("smoke", "kernels", "engine-tests", "decode-last")
    command = [sys.executable, "-m", "benchmarks.gpu", *names, "--dry", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    found = Findings(Results(tmp_path / "results.jsonl").lines())
    assert list(found.problems()) == []
    assert {one["job"] for one in found.ended()} == {"smoke", "kernels", "engine-flash-attn", "decode-last"}
    assert {one["part"] for one in found.lines if "part" in one} == {"sampler", "chain", "attention", "decode"}
    [decoded] = found.of_part("decode", side="last")
    assert decoded["decoding"] == decoded["requests"]
    assert decoded["host_ms"] > 0
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# GPU run")
    assert "| flash-attn | NONE |" in summary
