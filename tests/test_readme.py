"""The README says what the package does: its settings table is the generated one, and what it names is there."""

import re
import tomllib
from pathlib import Path

from typer.testing import CliRunner

from vllm_entropix.cli.main import app
from vllm_entropix.samplers.entropix.settings import as_mapping
from vllm_entropix.samplers.request import RequestSettings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_settings_table_is_the_generated_one():
    table = README.partition("<!-- settings:")[2].partition("-->")[2].partition("<!-- end of settings -->")[0]
    assert table.strip() == CliRunner().invoke(app, ["presets", "--markdown"]).output.strip()


def test_every_request_key_is_described():
    keys = {field.alias for field in RequestSettings.model_fields.values()}
    described = README.partition("## Per request")[2].partition("\n## ")[0]
    assert {key for key in keys if f"`{key}`" not in described} == set()


def test_the_example_of_a_settings_file_is_the_demo_models():
    example = README.partition("```toml\n")[2].partition("```")[0]
    shipped = as_mapping(str(ROOT / "vllm_entropix" / "demo_model" / "entropix.toml"))
    assert tomllib.loads(example) == shipped


def test_commands_of_the_page_exist():
    commands = set(re.findall(r"^\s*vllm-entropix (\w[\w-]*)", README, re.MULTILINE))
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
