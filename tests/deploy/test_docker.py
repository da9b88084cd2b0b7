"""The Dockerfiles: no registry of images is reached here, so they aren't built; what they refer to is checked."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy" / "docker").iterdir())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(path):
    text = re.sub(r"\\\n", " ", path.read_text())
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there(path):
    copied = [argument.split()[:-1] for name, argument in instructions(path) if name == "COPY"]
    assert copied
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_the_build_reads_of_the_project_is_copied(path):
    sources = " ".join(argument for name, argument in instructions(path) if name == "COPY")
    for needed in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "vllm_entropix"):
        assert needed in sources


def test_versions_agree():
    [version] = re.findall(r"^ARG VLLM_VERSION=(\S+)$", (ROOT / "deploy/docker/Dockerfile").read_text(), flags=re.M)
    for extra in ("cuda", "cpu"):
        [requirement] = PROJECT["optional-dependencies"][extra]
        assert version in SpecifierSet(re.sub(r"^[\w-]+", "", requirement))
    assert re.search(rf'VLLM = .*"{re.escape(version)}"', (ROOT / "scripts/set_up.py").read_text())
    chart = ROOT / "deploy" / "kubernetes" / "vllm-entropix"
    assert yaml.safe_load((chart / "Chart.yaml").read_text())["appVersion"] == version
    assert yaml.safe_load((chart / "values.yaml").read_text())["image"]["tag"] == version
