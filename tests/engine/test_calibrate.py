"""The loop of `vllm-entropix calibrate` on the shipped model: run, propose, and sample with what was proposed."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.engine import close_engine, engine, generate
from vllm_entropix.cli.calibrate import _PROMPTS, _asked, _measure
from vllm_entropix.cli.demo import load_prompts
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.engine.resolved import RESOLVED
from vllm_entropix.observability import neutral
from vllm_entropix.observability.calibration import MIN_TOKENS
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.samplers.entropix import calibrations
from vllm_entropix.samplers.entropix.settings import EntropixConfig

pytestmark = pytest.mark.engine

COMMAND = Path(sys.executable).parent / "vllm-entropix"
PROMPTS = [
    text
    for name in ("Finn", "Hugo", "Mia", "Otto", "Ida", "Lena", "Ben", "Ada")
    for text in (f"Tell me a story about a brave fox called {name}.", f"What is in the sealed box of {name}?")
]
SERVER = {"sampler": "entropix", "sampler_config": {"experiments": {"constants": True}}}
CHAT = [[{"role": "user", "content": text}] for text in PROMPTS]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    close_engine()
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [COMMAND, "calibrate", "demo", "--prompts", folder / "prompts.txt", "--max-tokens", "96"]
    command += ["-o", folder / "preset.toml", "--svg", folder / "shown.svg"]
    command += ["--engine", '{"max_model_len": 512, "enforce_eager": true, "dtype": "float32"}']
    command += ["--shares", "LELV=0.5,HELV=0.03"]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "COLUMNS": "120", "ENTROPIX_CALIBRATIONS": str(folder / "kept")}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, ended.stdout


def test_it_shows_distributions_and_shares(calibrated):
    folder, told = calibrated
    assert "Prompts go through the model's chat template." in told
    for words in ("entropy, bits", "varentropy, bits²", "fitting half", "checking half", "thresholds.helv.varentropy_below"):
        assert words in told
    # The shares are those of tokens that were drawn with what was found.
    assert re.search(r"LELV\s+│\s+50\.0%\s+│\s+(4[5-9]|5[0-5])\.\d%", told)
    # Of both halves together the mean is the base temperature.
    [(fitting, checking)] = re.findall(r"temperature\s+│\s+1\.000\s+│\s+(\d\.\d{3})\s+│\s+(\d\.\d{3}) ", told)
    assert (float(fitting) - 1) * (float(checking) - 1) <= 0
    assert re.search(r"HELV\s+│\s+3\.0%\s+│\s+\d\.\d%", told)
    assert f"--sampler-config {folder / 'preset.toml'}" in re.sub(r"\s+", " ", told)
    assert (folder / "shown.svg").read_text().startswith("<svg")


def test_it_is_kept_under_the_models_fingerprint(calibrated, monkeypatch):
    folder, told = calibrated
    monkeypatch.setenv(calibrations.FOLDER, str(folder / "kept"))
    own = calibrations.fingerprint(str(shipped_model()))
    assert own is not None
    found = calibrations.find(own)
    assert found is not None
    text = Path(found).read_text()
    assert text == (folder / "preset.toml").read_text()
    # Who reads it can do the same again.
    command = "vllm-entropix calibrate demo --prompts prompts.txt --shares LELV=0.5,HELV=0.03 --max-tokens 96 --engine '{"
    assert re.search(rf"^# {re.escape(command)}.*\(\d{{4}}-\d\d-\d\d, vllm-entropix \S+\)\.$", text, re.M)
    assert re.sub(r"\s", "", found) in re.sub(r"\s", "", told)


def test_an_engine_finds_the_proposal_and_samples_with_it(calibrated, monkeypatch):
    from vllm import SamplingParams

    folder, _ = calibrated
    monkeypatch.setenv(calibrations.FOLDER, str(folder / "kept"))
    config = EntropixConfig.from_file(folder / "preset.toml")
    llm = engine(shipped_model(), **SERVER)
    resolved = llm.llm_engine.vllm_config.additional_config[RESOLVED]["config"]
    found = config.model_dump(mode="json", include=set(calibrations.SECTIONS))
    assert {name: resolved[name] for name in calibrations.SECTIONS} == found
    params = SamplingParams(max_tokens=96, extra_args={"entropix_trace": "on"})
    outputs = llm.chat(CHAT, [params] * len(CHAT), use_tqdm=False)
    records = [record for output in outputs for record in output.outputs[0].entropix_trace]
    counts = Counter(record.regime for record in records)
    # Other draws than the calibration's, so about the shares that were asked for.
    assert 0.35 < counts["LELV"] / len(records) < 0.65
    assert set(counts) == set(REGIMES)
    borders = config.thresholds
    for record in records:
        sure = record.entropy < borders.lelv.entropy_below and record.varentropy < borders.lelv.varentropy_below
        assert (record.regime == "LELV") == sure
    assert generate(llm, ["a"], [SamplingParams(max_tokens=2)])[0].finished


def test_a_model_of_short_answers_is_asked_again(calibrated, monkeypatch):
    folder, _ = calibrated
    monkeypatch.setenv(calibrations.FOLDER, str(folder / "kept"))
    llm = engine(shipped_model(), **SERVER)
    prompts, _ = _asked(llm, load_prompts(_PROMPTS), chat=None)
    constants = neutral.without_regimes(0.03)
    found = _measure(llm, prompts, 256, constants, "again")
    assert sum(map(len, found)) >= 4 * MIN_TOKENS
    close_engine()  # others with the same arguments run without it
