"""Calibrations that are kept: whose they are, where they are found, and what can't be written."""

import shutil

import pytest

from vllm_entropix.cli import presets as cli
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.samplers.entropix import calibrations, presets
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError

TEXT = 'preset = "torch-2024-10"\n[thresholds.lelv]\nentropy_below = 0.5\n[base]\ntop_k = 5\n'


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv(calibrations.FOLDER, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(shipped_model(), tmp_path / "model")


def test_the_fingerprint_is_of_weights_and_tokenizer_wherever_they_lie(model):
    own = calibrations.fingerprint(str(model))
    assert own == calibrations.fingerprint(str(shipped_model()))
    assert own == calibrations.fingerprint(str(model.rename(model.with_name("moved"))))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_another_model_has_another_fingerprint(model, file):
    before = calibrations.fingerprint(str(model))
    path = model / file
    data = bytearray(path.read_bytes() if path.exists() else b"{}")
    # Of the same length, and in the middle: a model that was trained further.
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert calibrations.fingerprint(str(model)) not in (before, None)


def test_what_is_no_part_of_weights_or_tokenizer_changes_nothing(model):
    before = calibrations.fingerprint(str(model))
    (model / "README.md").write_text("hello")
    (model / "generation_config.json").write_text("{}")
    assert calibrations.fingerprint(str(model)) == before


def test_a_single_file_has_a_fingerprint(tmp_path):
    path = tmp_path / "some.gguf"
    path.write_bytes(bytes(range(256)) * 100)
    assert calibrations.fingerprint(str(path)) is not None


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder/at/all"])
def test_what_is_not_here_has_none(name):
    assert calibrations.fingerprint(name) is None


def test_a_folder_without_weights_has_none(tmp_path):
    assert calibrations.fingerprint(str(tmp_path)) is None


def test_what_is_kept_is_found_by_its_fingerprint_alone(kept):
    own = "0" * 32
    assert calibrations.find(own) is None
    path = calibrations.keep(own, TEXT)
    assert path.parent == kept
    assert calibrations.find(own) == str(path)
    assert calibrations.find("1" * 32) is None
    assert [entry.name for entry in kept.iterdir()] == [path.name]
    # Another preset's base is none of its business.
    assert calibrations.settings_of(str(path)) == {"preset": "torch-2024-10", "thresholds": {"lelv": {"entropy_below": 0.5}}}


def test_a_shipped_calibration_is_a_preset_over_the_one_that_it_names(kept, monkeypatch):
    own = "3" * 32
    text = f"# Fitted to mine.\n# {calibrations.line(own)}\n# More.\n{TEXT}"
    shipped = presets.preset_text
    names = (*presets.preset_names(), "mine")
    for module in (presets, calibrations, cli):
        monkeypatch.setattr(module, "preset_text", lambda name: text if name == "mine" else shipped(name))
    for module in (presets, calibrations):
        monkeypatch.setattr(module, "preset_names", lambda: names)
    mine, base = EntropixConfig.preset("mine"), EntropixConfig.preset("torch-2024-10")
    changed = {name: value for name, value in mine.numbers() if value != dict(base.numbers())[name]}
    assert changed == {"thresholds.lelv.entropy_below": 0.5, "base.top_k": 5}
    assert mine.preset_name == "mine"
    assert calibrations.find(own) == "mine"
    assert calibrations.settings_of("mine")["thresholds"]["lelv"]["entropy_below"] == 0.5
    assert cli.description("mine") == "Fitted to mine."


def test_a_preset_that_names_the_model_is_found_unless_the_user_keeps_another(kept, monkeypatch):
    own = "2" * 32
    text = f"# {calibrations.line(own)}\n{presets.preset_text('jax-2024-10')}"
    monkeypatch.setattr(calibrations, "preset_text", lambda name: text if name == "jax-2024-10" else "")
    assert calibrations.find(own) == "jax-2024-10"
    assert calibrations.settings_of("jax-2024-10").keys() == {"preset", *calibrations.SECTIONS}
    path = calibrations.keep(own, TEXT)
    assert path.parent == kept
    assert calibrations.find(own) == str(path)


def test_a_folder_that_cant_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(calibrations.FOLDER, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=f"can't keep calibrations in .*file: .*; {calibrations.FOLDER} names another folder"):
        calibrations.keep("0" * 32, TEXT)
    with pytest.raises(ConfigError, match="can't keep calibrations"), calibrations.alone("0" * 32):
        raise AssertionError("nobody may think that it is alone")
