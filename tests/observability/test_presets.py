"""`vllm-entropix presets`: the list, one in full, a file in full, TOML to start from."""

import pytest
from typer.testing import CliRunner

from vllm_entropix.cli.demo import shipped_model
from vllm_entropix.cli.main import app
from vllm_entropix.config import ConfigError, EntropixConfig


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments):
    ended = CliRunner().invoke(app, ["presets", *arguments])
    if ended.exception is not None:
        raise ended.exception
    return ended.output


def test_the_list_explains_presets_and_settings():
    told = run()
    assert "jax-2024-10 (default): The SamplerConfig of entropix's JAX version" in told
    assert "torch-2024-10: The constants in the code of entropix's PyTorch version" in told
    assert "thresholds.helv.entropy_above" in told
    assert "HELV needs a logits entropy above this." in told


def test_one_in_full():
    told = run("torch-2024-10")
    assert "PyTorch" in told
    assert "SamplerConfig" not in told


def test_a_file_in_full():
    told = run(str(shipped_model() / "entropix.toml"))
    assert "jax-2024-10 with what is bold" in told
    assert "hmm, which one?" in told


@pytest.mark.parametrize(
    "config",
    [EntropixConfig(), EntropixConfig.preset("torch-2024-10"), EntropixConfig.from_file(shipped_model() / "entropix.toml")],
)
def test_toml_to_start_from(tmp_path, config):
    source = tmp_path / "given.json"
    source.write_text(config.model_dump_json(by_alias=True))
    written = tmp_path / "written.toml"
    written.write_text(run("--toml", str(source)))
    assert EntropixConfig.from_file(written) == config


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="there are jax-2024-10, torch-2024-10"):
        run("llama")
