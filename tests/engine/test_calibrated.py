"""Which calibration a server runs with, without one being started."""

import logging
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.support.processes import ends
from vllm_entropix.cli import calibrate as command
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.engine import calibrated
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix import calibrations
from vllm_entropix.settings.errors import ConfigError

TEXT = 'preset = "torch-2024-10"\n[thresholds.lelv]\nentropy_below = 0.5\n[adaptive]\nsamples = 1\n'
MODEL = str(shipped_model())
OWN = calibrations.fingerprint(MODEL)


def engine_config(model=MODEL, dtype="torch.float32"):
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=model,
            tokenizer=model,
            revision=None,
            tokenizer_revision=None,
            quantization=None,
            dtype=dtype,
            max_model_len=512,
            trust_remote_code=False,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.9),
    )


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv(calibrations.FOLDER, str(tmp_path))
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(calibrated, "logger", logging.getLogger("of this test"))
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(calibrated.logger, "handlers", [handler])
    calibrated.logger.setLevel(logging.INFO)
    return lines


@pytest.mark.parametrize("wanted", [True, {}, {"base": {"top_k": 5}}, '{"trace": {"default": true}}'])
def test_without_one_a_line_says_how_to_get_it(wanted, said):
    assert calibrated.with_calibration(wanted, engine_config(), says=True) == wanted
    [line] = said
    assert "no calibration of this model is known" in line
    assert f"vllm-entropix calibrate {MODEL}" in line
    calibrated.with_calibration(wanted, engine_config(), says=False)
    assert len(said) == 1


def test_the_one_that_is_kept_lies_under_what_is_given(said):
    path = calibrations.keep(OWN, TEXT)
    wanted = {"base": {"top_k": 5}, "attention": {"enabled": False}}
    config = registry.load_server(calibrated.with_calibration(wanted, engine_config(), says=True))
    assert (config.preset_name, config.base.top_k) == ("torch-2024-10", 5)
    assert (config.thresholds.lelv.entropy_below, config.adaptive.samples, config.attention.enabled) == (0.5, 1, False)
    assert said == [f"entropix: runs with the calibration {path} (fingerprint {OWN})."]


@pytest.mark.parametrize(
    "wanted",
    [
        "jax-2024-10",
        {"preset": "jax-2024-10"},
        {"thresholds": {"lelv": {"entropy_below": 1}}},
        {"adaptive": {"samples": 2}},
        {"sampler": "min_p"},
    ],
)
def test_who_chooses_for_himself_is_left_alone(wanted, said):
    calibrations.keep(OWN, TEXT)
    assert calibrated.with_calibration(wanted, engine_config(), says=True) is wanted
    assert said == []


def test_auto_takes_the_one_that_is_kept_over_any_preset(monkeypatch):
    calibrations.keep(OWN, TEXT)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it is there already"))
    wanted = {"preset": "jax-2024-10", "thresholds": "auto", "adaptive": {"samples": 2}}
    config = registry.load_server(calibrated.with_calibration(wanted, engine_config(), says=True))
    assert (config.preset_name, config.thresholds.lelv.entropy_below, config.adaptive.samples) == ("jax-2024-10", 0.5, 2)


def test_auto_calibrates_once(monkeypatch):
    calls = []

    def said(command, _seconds):
        calls.append(command)
        calibrations.keep(OWN, TEXT)
        return ""

    monkeypatch.setattr(calibrated, "_said", said)
    for _ in range(2):
        merged = calibrated.with_calibration({"thresholds": "auto"}, engine_config(), says=True)
        assert merged["thresholds"] == {"lelv": {"entropy_below": 0.5}}
    [command] = calls
    assert command[1:5] == ["-m", "vllm_entropix", "calibrate", MODEL]
    assert '"dtype": "float32"' in command[-1]


@pytest.mark.parametrize(("on_cpu", "said"), [(True, False), (False, True)])
def test_auto_leaves_types_of_two_bytes_to_the_command_on_a_cpu(monkeypatch, on_cpu, said):
    calls = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: not on_cpu)
    monkeypatch.setattr(calibrated, "_said", lambda command, _: calls.append(command) or "no")
    with pytest.raises(ConfigError):
        calibrated.with_calibration({"thresholds": "auto"}, engine_config(dtype="torch.bfloat16"), says=True)
    assert ('"dtype": "bfloat16"' in calls[0][-1]) is said


@pytest.mark.parametrize(
    ("has", "given", "dtype"), [(False, {}, "float32"), (True, {}, None), (False, {"dtype": "half"}, "half")]
)
def test_the_command_runs_a_model_in_a_type_that_the_cpu_multiplies(monkeypatch, has, given, dtype):
    made = []
    monkeypatch.setattr("os.environ", os.environ.copy())  # what it sets is of its own process
    monkeypatch.setattr("vllm.LLM", lambda _model, **arguments: made.append(arguments))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": has})
    command._start(Console(quiet=True), MODEL, "jax-2024-10", 0, given)
    assert made[0].get("dtype") == dtype


def test_auto_that_fails_ends_the_start_with_the_reason(monkeypatch):
    said = "Traceback\nvllm-entropix: there are no more such tokens\n"
    monkeypatch.setattr(calibrated, "_said", lambda *_: said)
    with pytest.raises(ConfigError, match=r"thresholds is auto, but .*: vllm-entropix: there are no more such tokens; run"):
        calibrated.with_calibration({"thresholds": "auto"}, engine_config(), says=True)


def test_auto_needs_the_weights(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="weights of nobody/nothing aren't on this machine yet; download them first"):
        calibrated.with_calibration({"thresholds": "auto"}, engine_config("nobody/nothing"), says=True)


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    told = tmp_path / "started"
    started = "import os, time; open(os.sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    source = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {started!r}, sys.argv[1]]); time.sleep(60)"
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        calibrated._said([sys.executable, "-c", source, str(told)], 2)
    assert time.monotonic() - begun < 30, "it waited for what was started"
    assert ends(int(told.read_text())), "what was started still runs"


def test_what_a_command_says_of_errors_is_given():
    source = "import sys; print('aside'); sys.exit('no')"
    assert calibrated._said([sys.executable, "-c", source], 60) == "no\n"
