"""deploy/ray/batch.py: a batch of 500 prompts that is killed on its way, and started again."""

import json
import time

import pyarrow as pa
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from deploy.ray import batch
from tests.support import ray_cluster
from tests.support.engine import close_engine
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.observability.tracefile import read_traces

pytestmark = pytest.mark.engine

ROWS = 500
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 26}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": f"row-{i}", "prompt": f"What is {i} + {i % 7}?"} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(prompts, output):
    return (
        *(
            "deploy/ray/batch.py",
            "run",
            str(prompts),
            str(output),
            "--cpu",
            "--part-rows",
            "50",
            "--model",
            str(shipped_model()),
        ),
        *("--engine-kwargs", json.dumps(ENGINE), "--sampling-params", '{"max_tokens": 12}'),
        *("--sampler-config", '{"attention": {"layers": "all"}}'),
    )


def finished(output):
    """When each finished file was written."""
    return {file: file.stat().st_mtime_ns for file in batch.finished_files(output)} if output.exists() else {}


def test_killed_and_resumed_no_row_is_lost_or_repeated(prompts, tmp_path):
    close_engine()
    output = tmp_path / "results"
    with ray_cluster.driver(tmp_path / "first", *command(prompts, output)) as process:
        deadline = time.monotonic() + 200
        while not finished(output):
            assert process.poll() is None, (tmp_path / "first").read_text(errors="replace")[-5000:]
            assert time.monotonic() < deadline, (tmp_path / "first").read_text(errors="replace")[-5000:]
            time.sleep(0.05)
    assert process.returncode != 0
    before = finished(output)
    assert 0 < len(list(batch.read_results(output))) < ROWS
    with ray_cluster.driver(tmp_path / "second", *command(prompts, output)) as process:
        assert process.wait(200) == 0, (tmp_path / "second").read_text(errors="replace")[-5000:]
    rows = list(batch.read_results(output))
    assert sorted(row["id"] for row in rows) == sorted(f"row-{i}" for i in range(ROWS))
    assert all(row["text"] and row["finish_reason"] for row in rows)
    assert f"{ROWS} rows are in" in (tmp_path / "second").read_text(errors="replace")
    # What was finished before was not done again.
    assert finished(output).items() >= before.items()
    traces = tmp_path / "traces.jsonl"
    assert CliRunner().invoke(batch.application, ["traces", str(output), "-o", str(traces)]).exit_code == 0
    lines = list(read_traces(traces))
    assert len(lines) == ROWS
    assert all(len(line.records) == len(line.token_ids) for line in lines)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["a.jsonl", "s3://bucket/results"], "not to a URL"),
        (["a.jsonl", "two\nlines"], "line breaks"),
        (["a.jsonl", "results", "--sampling-params", "{max_tokens: 2}"], "--sampling-params isn't JSON"),
        (["a.jsonl", "results", "--sampling-params", "[1]"], "--sampling-params has to be an object"),
        (["a.jsonl", "results", "--engine-kwargs", "dtype"], "--engine-kwargs isn't JSON"),
        (["a.jsonl", "results", "--sampler-config", '{"presett": "x"}'], "presett"),
    ],
    ids=lambda case: case if isinstance(case, str) else None,
)
def test_wrong_arguments_are_refused_before_ray_starts(arguments, problem):
    ended = CliRunner().invoke(batch.application, ["run", *arguments], env={"COLUMNS": "300", "TERM": "dumb"})
    assert ended.exit_code == 2
    assert problem in ended.output


READ = """
import sys, typer
from deploy.ray import batch
for path in sys.argv[1:]:
    try:
        batch._read(path)
    except typer.BadParameter as refused:
        print("REFUSED", path, refused)
"""


def test_rows_without_ids_are_refused(tmp_path):
    (tmp_path / "no-ids.jsonl").write_text('{"prompt": "a"}\n')
    pa.parquet.write_table(pa.table({"id": [1], "question": ["a"]}), tmp_path / "no-prompts.parquet")
    (tmp_path / "good.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    problems = {
        "no-ids.jsonl": "have no column id",
        "no-prompts.parquet": "neither a column prompt",
        "not-there.jsonl": "isn't there",
        "good.jsonl": None,
    }
    with ray_cluster.driver(tmp_path / "log", "-c", READ, *(str(tmp_path / name) for name in problems)) as process:
        assert process.wait(100) == 0
    refused = [line for line in (tmp_path / "log").read_text(errors="replace").splitlines() if line.startswith("REFUSED")]
    for name, problem in problems.items():
        found = [line for line in refused if line.startswith(f"REFUSED {tmp_path / name} ")]
        assert [problem in line for line in found] == ([True] if problem else []), name
