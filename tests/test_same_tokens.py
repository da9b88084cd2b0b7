"""tools/same_tokens without an engine: what is asked, and what two recordings are said to differ in."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.same_tokens.checkout import digest, environment, install
from tools.same_tokens.generate import exact
from tools.same_tokens.parts import PARTS, VARIANTS
from tools.same_tokens.recording import Comparison, Recording, RecordingError, Summary
from vllm_entropix import EntropixConfig

ROOT = Path(__file__).resolve().parents[1]
RECORD = {"regime": "LELV", "forced": False, "entropy": (0.1).hex(), "alternatives": [[3, (0.5).hex()]]}


def recording(**about: Any) -> Recording:
    """Two requests of one part."""
    completion = {
        "token_ids": [3, 4],
        "finish_reason": "length",
        "logprobs": None,
        "trace": [RECORD, {**RECORD, "forced": True}],
    }
    untraced = {**completion, "trace": None}
    answers = {"00 default": {"completions": [completion]}, "01 off": {"completions": [untraced, untraced]}}
    return Recording({"machine": "one", **about}, {"v1": json.loads(json.dumps(answers))})


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.same_tokens", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_there_are_200_requests_of_every_kind() -> None:
    assert sum(part.requests for part in PARTS.values()) == 200
    asked = {name.split(" ", 1)[1] for part in PARTS.values() for name, _, _ in part.asked()}
    assert asked == VARIANTS.keys()
    for part in PARTS.values():
        EntropixConfig.from_dict(part.settings)
        assert len({name for name, _, _ in part.asked()}) == part.requests


def test_the_least_bit_is_a_difference() -> None:
    before, after = recording(), recording()
    assert Comparison.of(before, after) == Comparison()
    after.parts["v1"]["00 default"]["completions"][0]["trace"][1]["entropy"] = math.nextafter(0.1, 1.0).hex()
    [(request, (place, one, other))] = Comparison.of(before, after).different.items()
    assert (request, place) == ("v1: 00 default", "completions[0].trace[1].entropy")
    assert float.fromhex(one) < float.fromhex(other)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda completion: completion["token_ids"].append(5), "completions[0].token_ids"),
        (lambda completion: completion.update(trace=None), "completions[0].trace"),
        (lambda completion: completion["trace"][0].pop("entropy"), "completions[0].trace[0].entropy"),
        (lambda completion: completion["trace"][0].update(forced=0), "completions[0].trace[0].forced"),
    ],
)
def test_what_is_missing_or_of_another_kind_is_a_difference(change: Any, place: str) -> None:
    before, after = recording(), recording()
    change(after.parts["v1"]["00 default"]["completions"][0])
    assert [found[0] for found in Comparison.of(before, after).different.values()] == [place]


def test_a_request_without_an_answer_is_a_difference_and_a_further_field_is_none() -> None:
    before, after = recording(), recording()
    del after.parts["v1"]["01 off"]
    after.parts["v1"]["00 default"]["completions"][0]["trace"][0]["sampler"] = "entropix"
    found = Comparison.of(before, after)
    assert list(found.different) == ["v1: 01 off"]
    assert found.further == {"sampler"}


def test_a_summary_counts_completions_tokens_and_regimes() -> None:
    summary = Summary.of(recording().parts["v1"])
    assert (summary.requests, summary.tokens, summary.records, summary.forced) == (2, 6, 2, 1)
    assert summary.regimes == {"LELV": 2}


def test_values_are_kept_to_the_bit() -> None:
    assert exact([1, True, None, "a", (0.1,)]) == [1, True, None, "a", ["0x1.999999999999ap-4"]]


def test_files_are_compared_by_the_command(tmp_path: Path) -> None:
    one, other, none = tmp_path / "one.json.gz", tmp_path / "other.json.gz", tmp_path / "none.json.gz"
    recording().write(one)
    changed = recording(machine="other")
    changed.parts["v1"]["01 off"]["completions"][1]["token_ids"][0] = 9
    changed.write(other)
    none.write_bytes(b"{}")
    alike = run("compare", one, one)
    assert (alike.returncode, alike.stdout.splitlines()[-1]) == (0, "all 2 requests are answered alike, bit for bit")
    different = run("compare", one, other)
    assert (different.returncode, different.stdout.splitlines()[-1]) == (1, "1 of 2 requests are answered otherwise")
    told = " ".join(different.stderr.split())
    assert "made with another machine" in told
    assert "v1: 01 off: completions[1].token_ids[0]: 3 before, 9 after" in told
    refused = run("compare", one, none)
    assert (refused.returncode, "is no recording" in " ".join(refused.stderr.split())) == (2, True)
    with pytest.raises(RecordingError, match="No such file"):
        Recording.read(tmp_path / "nothing")


def test_another_checkout_is_imported_with_its_own_entry_points(tmp_path: Path) -> None:
    checkout, folder = tmp_path / "checkout", tmp_path / "folder"
    (checkout / "vllm_entropix").mkdir(parents=True)
    folder.mkdir()
    (checkout / "vllm_entropix" / "__init__.py").write_text("old = True\n")
    project = (
        '[project]\nname = "vllm-entropix"\n[project.entry-points."vllm.general_plugins"]\nentropix = "vllm_entropix:old"\n'
    )
    (checkout / "pyproject.toml").write_text(project)
    before = digest(checkout)
    install(checkout, folder)
    code = (
        "import json, vllm_entropix, tools.same_tokens; from importlib.metadata import entry_points; "
        "print(json.dumps([vllm_entropix.old, [p.value for p in entry_points(group='vllm.general_plugins', name='entropix')]]))"
    )
    env = {**os.environ, **environment(PARTS["v1"], folder)}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == [True, ["vllm_entropix:old"]]
    (checkout / "vllm_entropix" / "__init__.py").write_text("old = None\n")
    assert digest(checkout) != before
