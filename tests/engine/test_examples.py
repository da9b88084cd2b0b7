"""Every script of examples/, as its first lines say to run it: against one server, in an engine of its own, or in Ray's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ray_cluster
from tests.support.engine import close_engine
from tests.support.server import environment, result_of, serve
from vllm_entropix.demo_model import shipped_model

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
CLIENTS = ("chat_stream.py", "compare_with_greedy.py")


def run(script: str, *arguments: object, status: int = 0, **env: str) -> str:
    """What a script prints; of its errors where it should fail."""
    command = [str(EXAMPLES / script), *map(str, arguments)]
    if script.endswith(".py"):
        command.insert(0, sys.executable)
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(COLUMNS="80", **env), check=False
    )
    assert ended.returncode == status, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr
    return ended.stdout if status == 0 else ended.stderr


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with the shipped model: its URL, and the file of its traces."""
    close_engine()
    folder = tmp_path_factory.mktemp("examples")
    settings = {"preset": "jax-2024-10", "trace": {"path": str(folder / "traces.jsonl"), "prompts": True}}
    settings |= {"thresholds": {"helv": {"varentropy_below": 4.5}}, "clarification": {"text": " ... hmm, which one?"}}
    arguments = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(1 << 28), "--enforce-eager", "--dtype", "float32")
    with serve(
        shipped_model(), folder / "log", "--sampler", "entropix", "--sampler-config", json.dumps(settings), *arguments
    ) as url:
        yield url, folder / "traces.jsonl"


@pytest.fixture(scope="module")
def compared(served):
    """What the comparison prints; its eight answers are in the server's traces."""
    return run("compare_with_greedy.py", "--url", f"{served[0]}/v1")


def test_all_are_listed():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".ipynb")]
    assert [name for name in named if f"[{name}]({name})" not in text] == []


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS] + ["lm_eval.sh"])
def test_help_says_how_to_run_it(script):
    assert f"examples/{script}" in run(script, "--help")


@pytest.mark.parametrize("script", CLIENTS)
def test_without_a_server_the_client_says_so(script):
    said = run(script, "--url", "http://127.0.0.1:9/v1", status=1)
    assert said.startswith("no server answers at http://127.0.0.1:9/v1")
    assert len(said.splitlines()) == 1


def test_a_stream_is_coloured(served):
    url, _ = served
    asked = ("What has keys but opens no door?", "--url", f"{url}/v1", "--seed", 0)
    shown = run("chat_stream.py", *asked, FORCE_COLOR="1", TERM="xterm")
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert plain != shown
    assert "piano" in plain
    assert "6 forced" in plain


def test_answers_are_compared_with_greedy_ones(compared):
    assert "the same, token for token" in compared  # a sum
    assert "they part at token" in compared
    assert "of 4 answers are the same" in compared


def test_answers_are_scored_from_the_servers_traces(served, compared):
    _, traces = served
    table = [json.loads(row) for row in run("score_answers.py", traces, "--json", "--by", "max_entropy").splitlines()]
    assert len(table) >= 8, "greedy answers included"
    assert [row["max_entropy"] for row in table] == sorted((row["max_entropy"] for row in table), reverse=True)
    [*_, sure] = [row for row in table if "column by column" in row["answer"]]
    assert sure["max_entropy"] < 0.5 < 5 < table[0]["max_entropy"]
    assert run("score_answers.py", traces).splitlines()[0].split() == [
        "mean_entropy",
        "max_entropy",
        "unsure",
        "surprise",
        "answer",
    ]
    assert "can't read" in run("score_answers.py", traces.with_name("no such file"), status=1)


def test_the_evaluation_asks_for_what_it_compares(served, tmp_path):
    """lm-eval isn't among what tests install: a stand-in shows what is asked of it."""
    url, _ = served
    stand_in = tmp_path / "lm_eval"
    stand_in.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    stand_in.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    shown = run("lm_eval.sh", "-u", url, "-l", 4, "-o", tmp_path / "out", PATH=path).splitlines()
    asked = [json.loads(word) for word in shown if word.startswith('{"temperature"')]
    assert [settings["vllm_xargs"] for settings in asked] == [{"entropix": "on"}, {"entropix": "off"}]
    assert all(settings["temperature"] > 0 for settings in asked)
    assert f"model={shipped_model()}," in next(word for word in shown if word.startswith("base_url="))
    assert shown.count("--limit") == 2
    assert "no server answers" in run("lm_eval.sh", "-u", "http://127.0.0.1:9", status=1, PATH=path)
    assert "lm_eval isn't installed" in run("lm_eval.sh", status=1, PATH="/usr/bin:/bin")


def test_the_notebooks_cells_run():
    close_engine()
    shown = result_of("notebook_script", EXAMPLES / "signals.ipynb")
    assert shown["cells"] >= 6
    notebook = json.loads((EXAMPLES / "signals.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), "it is kept with its outputs"
    assert sum(bool(cell["outputs"]) for cell in code) == shown["values"]
    assert (EXAMPLES / "signals.ipynb").stat().st_size < 200_000


def test_an_actor_gives_traced_outputs(tmp_path):
    close_engine()
    with ray_cluster.driver(
        tmp_path / "log", str(EXAMPLES / "ray_actor.py"), "Once upon a time", "--max-tokens", "20"
    ) as process:
        status = process.wait(240)
    shown = (tmp_path / "log").read_text(errors="replace")
    assert status == 0, shown[-5000:]
    assert "'Once upon a time' → " in shown
    assert "LELV" in shown
