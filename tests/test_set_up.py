"""scripts/set_up.py: what would fail later is said in one line before anything is downloaded, once."""

import importlib.util
import re
import shutil
import tomllib
import venv
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vllm_entropix.engine import versions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def set_up():
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "scripts" / "set_up.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python(set_up, monkeypatch):
    monkeypatch.setattr(set_up.sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"^set-up: Python 3.11 or newer is needed.*make PYTHON=python3.11"):
        set_up.check_machine("cpu")


def test_a_full_disk(set_up, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(set_up.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 2**30))
    with pytest.raises(SystemExit, match=r"^set-up: 5 GiB of disk are needed here, 1.0 GiB are free"):
        set_up.check_machine("cpu")


def test_no_compiler(set_up, monkeypatch, capsys):
    monkeypatch.setattr(set_up.shutil, "which", lambda name: None)
    set_up.check_machine("cpu")
    assert "no C++ compiler found" in capsys.readouterr().out


def test_a_failing_pip_ends_in_one_line(set_up, tmp_path):
    failing = shutil.which("false")
    with pytest.raises(SystemExit, match=r"^set-up: failed: -m pip .* install torch"):
        set_up.pip(Path(failing), "install", "torch")


@pytest.mark.parametrize("status", [0, 2])
def test_what_uv_cannot_get_pip_does(set_up, tmp_path, monkeypatch, capsys, status):
    venv.create(tmp_path / "venv", symlinks=True)
    [packages] = tmp_path.glob("venv/lib/*/site-packages")
    (packages / "uv.py").write_text(
        f"import pathlib, sys; pathlib.Path({str(tmp_path / 'told')!r}).write_text(' '.join(sys.argv))\n"
    )
    with (packages / "uv.py").open("a") as uv:
        uv.write(f"sys.exit({status})\n")
    installed = []
    monkeypatch.setattr(set_up, "pip", lambda python, *arguments: installed.append(Path(arguments[-1]).read_text()))
    (tmp_path / "lock").write_text("a==1 \\\n    --hash=sha256:1\nuv==2 \\\n    --hash=sha256:2\n    # via a\nuvloop==3\n")
    set_up.install_locked(tmp_path / "venv" / "bin" / "python", tmp_path / "lock")
    assert installed[0] == "uv==2 \\\n    --hash=sha256:2\n    # via a\n"
    assert (tmp_path / "told").read_text().endswith(f"--no-deps --require-hashes -r {tmp_path / 'lock'}")
    assert installed[1:] == ([(tmp_path / "lock").read_text()] if status else [])
    assert ("pip takes over" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_torch_that_cannot_be_imported_yet_tells_what_it_was_built_for(set_up, tmp_path, cuda):
    venv.create(tmp_path, symlinks=True)
    [packages] = tmp_path.glob("lib/*/site-packages")
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text("import what_the_lock_installs_later\n")
    (packages / "torch" / "version.py").write_text(f"cuda = {cuda!r}\n")
    assert set_up.is_for_cuda(tmp_path / "bin" / "python") == (cuda is not None)


def test_what_is_installed_is_compiled_as_far_as_it_can_be(set_up, tmp_path):
    venv.create(tmp_path, symlinks=True)
    [packages] = tmp_path.glob("lib/*/site-packages")
    (packages / "good.py").write_text("x = 1\n")
    (packages / "template.py").write_text("x = {{ x }}:\n")
    set_up.compile_packages(tmp_path / "bin" / "python")
    assert [path.name.partition(".")[0] for path in packages.rglob("*.pyc")] == ["good"]


def test_a_finished_set_up_is_not_done_again(set_up, tmp_path, monkeypatch, capsys):
    (tmp_path / "set-up-done").write_text(set_up.fingerprint("cpu"))
    monkeypatch.setattr(set_up.sys, "argv", ["set_up.py", "--venv", str(tmp_path), "--build", "cpu"])
    set_up.main()
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["set-up-done"]


LOCK = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")


def test_the_lock_has_hashes_and_no_place_of_this_machine():
    pins = re.findall(r"^\S+==\S+.*?(?=^\S|\Z)", LOCK, re.MULTILINE | re.DOTALL)
    assert len(pins) > 150
    assert [pin for pin in pins if "--hash=sha256:" not in pin] == []
    # Any index offers these files: the lock names none, and no file of a machine.
    assert re.findall(r"://|--(?:extra-)?index|--find-links|@ ?/", LOCK) == []


def test_the_versions_that_are_set_up_are_read(set_up):
    assert (set_up.VLLM, set_up.TORCH) == (versions.TESTED, versions.TORCH)


def test_the_lock_has_no_torch():
    assert re.search(r"^torch(vision|audio|codec)?==", LOCK, re.MULTILINE) is None


def test_the_lock_has_all_that_the_project_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    pins = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE)}
    locked = [text for name, texts in extras.items() if name != "cuda" for text in texts]
    for text in [*project["dependencies"], *locked]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
