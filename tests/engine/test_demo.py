"""`vllm-entropix demo`: the shipped model in a real engine, as `make demo` runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine import close_engine
from tests.support.server import environment
from vllm_entropix.sampling import Regime

pytestmark = pytest.mark.engine

COMMAND = Path(sys.executable).parent / "vllm-entropix"


def run_demo(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    close_engine()
    settings = environment(COLUMNS="140", **env)
    return subprocess.run(
        [str(COMMAND), "demo", *arguments], capture_output=True, text=True, timeout=300, env=settings, check=False
    )


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the demo prints, and the picture it writes."""
    picture = tmp_path_factory.mktemp("demo") / "demo.svg"
    ended = run_demo("--svg", str(picture), "--max-tokens", "120")
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended, picture.read_text()


def test_every_regime_is_seen_and_tokens_are_forced(shown):
    ended, picture = shown
    table = [line for line in ended.stdout.splitlines() if line.startswith("│") and line.count("│") > 6]
    seen = [0] * (len(Regime) + 1)
    for line in table:
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        counts = [0 if cell == "·" else int(cell) for cell in (*cells[2:7], cells[-1])]
        assert sum(counts[:5]) == int(cells[1]), "every token has one regime"
        seen = [a + b for a, b in zip(seen, counts, strict=True)]
    assert all(seen), dict(zip([*Regime.__members__, "forced"], seen, strict=True))
    assert "svg" in picture
    assert "LELV" in picture


def test_problems_are_right_and_asking_back_helps(shown):
    ended, _ = shown
    verdicts = re.findall(r"(entropix|greedy|plain)\s+(✓|✗)", ended.stdout)
    by_mode = {mode: [mark for name, mark in verdicts if name == mode] for mode in ("entropix", "greedy", "plain")}
    assert by_mode["entropix"] == ["✓"] * 4  # a sum, a word problem, and two questions that need the clarification
    assert by_mode["greedy"] == ["✓", "✓", "✗", "✗"]


def test_a_chain_runs_beside_entropix(shown):
    """On the story, with its settings; the same prompt has all other modes, too."""
    story = next(panel for panel in shown[0].stdout.split("╭") if panel.startswith("─ story "))
    modes = re.findall(r"^│ (entropix|greedy|plain|chain)  (.*?) *│$", story, re.MULTILINE)
    assert [mode for mode, _ in modes] == ["entropix", "greedy", "plain", "chain"]
    assert modes[-1][1] == "dry;top_n_sigma;xtc;min_p;temperature, dry_multiplier 0.8, xtc_probability 0.5"
    told = story.partition("xtc_probability 0.5")[2]
    assert "Finn" in told


def test_a_story_forks_and_its_tree_is_drawn(shown):
    story = next(panel for panel in shown[0].stdout.split("╭") if panel.startswith("─ story "))
    told = story.partition("│ forks ")[2]
    branches = re.findall(r"(?:├── |└── )'.*' at token (\d+), (\d+) tokens?", told)
    assert len(branches) >= 1
    assert told.count(", the answer") == 1
    assert ", given up at token " in told


def test_progress_is_shown(shown):
    assert "in one batch" in shown[0].stderr


@pytest.mark.parametrize("mistake", [("--sampler-config", "no-such-preset"), ("--only", "no such prompt")])
def test_mistakes_end_in_one_line(mistake):
    ended = run_demo(*mistake)
    assert ended.returncode == 1
    assert mistake[1] in ended.stderr
    assert "Traceback" not in ended.stderr
