"""`vllm-entropix doctor`: all well here, and status 1 for each thing that may be broken."""

import pytest
from typer.testing import CliRunner

from vllm_entropix.cli import doctor
from vllm_entropix.cli.main import app
from vllm_entropix.engine import compat


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments):
    ended = CliRunner().invoke(app, ["doctor", *arguments])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.output


def test_here_all_is_well():
    status, told = run("demo", "--sampler-config", '{"attention": {"layers": "all"}}')
    assert status == 0, told
    assert "Nothing is broken" in told
    for patch in compat.PATCHES:
        assert patch.name in told
    for words in ("vllm-entropix", "model runner", "attention backend", "CPU_ATTN", "supported with these settings"):
        assert words in told


@pytest.fixture
def fast(monkeypatch):
    """Without the hooks, which take the import of vLLM's servers."""
    monkeypatch.setattr(doctor, "_hooks", lambda: iter(()))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("VLLM_PLUGINS", "another", "leaves entropix out"), ("VLLM_ENTROPIX_DISABLE", "1", "the plugin does nothing")],
)
def test_a_plugin_that_is_left_out(monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    status, told = run()
    assert status == 1
    assert words in told
    assert "1 broken" in told


@pytest.mark.usefixtures("fast")
def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if "vllm" in name or name == "pandas" else "1.0")
    status, told = run()
    assert status == 1
    assert "install vllm-entropix[cuda] or vllm-entropix[cpu]" in told
    assert "missing (export)" in told
    assert "1 broken" in told


@pytest.mark.usefixtures("fast")
def test_a_setting_or_a_model_that_cant_be_had():
    status, told = run("demo", "--sampler-config", '{"attention": {"layers": [99]}}')
    assert status == 1
    assert "attention.layers names layer 99" in told
    status, told = run("/nowhere/model")
    assert status == 1
    assert "examination" in told


def test_hooks_that_dont_hold(monkeypatch):
    from vllm.v1.engine.output_processor import RequestState

    monkeypatch.setattr(RequestState, "make_request_output", lambda self: None)
    monkeypatch.setattr(compat.Patch, "install", lambda self: None)
    monkeypatch.setattr(doctor, "_installed", lambda: iter(()))
    status, told = run()
    assert status == 1
    assert "vLLM's own function is in place; another plugin may have put it back" in told
    assert "RequestState.make_request_output has no parameter" in told
