"""The loop of `vllm-entropix calibrate` on the shipped model: run, propose, and sample with what was proposed."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.engine import close_engine, engine, generate
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.samplers.entropix.settings import EntropixConfig

pytestmark = pytest.mark.engine

COMMAND = Path(sys.executable).parent / "vllm-entropix"
PROMPTS = [
    text
    for name in ("Finn", "Hugo", "Mia", "Otto", "Ida", "Lena", "Ben", "Ada")
    for text in (f"Tell me a story about a brave fox called {name}.", f"What is in the sealed box of {name}?")
]
CHAT = [[{"role": "user", "content": text}] for text in PROMPTS]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    close_engine()
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command = [COMMAND, "calibrate", "demo", "--prompts", folder / "prompts.txt", "--chat", "--max-tokens", "96"]
    command += ["-o", folder / "preset.toml", "--svg", folder / "shown.svg"]
    command += ["--engine", '{"max_model_len": 512, "enforce_eager": true, "dtype": "float32"}']
    command += ["--shares", "LELV=0.5,HELV=0.03"]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "COLUMNS": "120"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, ended.stdout


def test_it_shows_distributions_and_shares(calibrated):
    folder, told = calibrated
    for words in ("entropy, bits", "varentropy, bits²", "fitting half", "checking half", "thresholds.helv.varentropy_below"):
        assert words in told
    assert re.search(r"LELV\s+│\s+50\.0%\s+│\s+50\.\d%", told)
    assert re.search(r"HELV\s+│\s+3\.0%\s+│\s+\d\.\d%", told)
    assert f"--sampler-config {folder / 'preset.toml'}" in re.sub(r"\s+", " ", told)
    assert (folder / "shown.svg").read_text().startswith("<svg")


def test_the_proposal_is_what_an_engine_samples_with(calibrated):
    from vllm import SamplingParams

    folder, _ = calibrated
    preset = folder / "preset.toml"
    config = EntropixConfig.from_file(preset)
    llm = engine(shipped_model(), sampler="entropix", sampler_config=str(preset))
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
