"""`vllm-entropix presets`: the list, one in full, a file in full, TOML to start from; for a terminal and through a pipe."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import tomllib
from fcntl import ioctl
from termios import TIOCSWINSZ

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from typer.testing import CliRunner

from vllm_entropix.cli.listing import settings
from vllm_entropix.cli.main import app
from vllm_entropix.cli.presets import toml
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix.presets import preset_names
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError

COMMAND = [sys.executable, "-m", "vllm_entropix"]
NAMES = [name for name, _, _ in settings(registry.load_server(None))]


def run(*arguments):
    ended = CliRunner().invoke(app, ["presets", *arguments])
    if ended.exception is not None:
        raise ended.exception
    return ended.output


def in_a_terminal(*arguments, command="presets", columns=80):
    """What a terminal of this width is sent, without colours."""
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*COMMAND, command, *arguments], stdout=theirs, stdin=theirs, env={**environment, "TERM": "xterm", "NO_COLOR": "1"}
    )
    os.close(theirs)
    sent = b""
    try:
        while part := os.read(ours, 65536):
            sent += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", sent.decode()).replace("\r\n", "\n")


def test_the_list_explains_presets_and_settings():
    told = run()
    assert "jax-2024-10 (default): The SamplerConfig of entropix's JAX version" in told
    assert "neutral-cool: Around what a request asks for: cooler where the model is unsure" in told
    assert "torch-2024-10: The constants in the code of entropix's PyTorch version" in told
    assert "explore: Branches that start from unlikely tokens" in told
    lines = {line[2:].split()[0]: line for line in told.splitlines()[len(preset_names()) + 2 :]}
    assert list(lines) == NAMES  # each on one line
    assert lines["thresholds.helv.entropy_above"].split(maxsplit=4) == [
        "*",
        "thresholds.helv.entropy_above",
        "5.0",
        "3.0",
        "HELV needs a logits entropy above this. [0, 64] bits",
    ]
    assert lines["base.temperature"].startswith("  ")  # equal in both
    assert told.isascii() or not set("│┃━─┏╇") & set(told)


@pytest.mark.parametrize("arguments", [(), (str(shipped_model() / "entropix.toml"),)])
def test_it_can_be_read_on_eighty_columns(arguments):
    told = in_a_terminal(*arguments)
    lines = [line.rstrip() for line in told.splitlines()]
    assert max(map(len, lines)) <= 80
    for name in NAMES:
        # Name and value on one line, what it means on the next, in whole words.
        [at] = [number for number, line in enumerate(lines) if line[2:].split(" ")[0] == name]
        assert len(lines[at].split()) > 1
        assert lines[at + 1].startswith("      ")
    assert "      HELV needs a logits entropy above this. [0, 64] bits" in lines or arguments


def test_one_in_full():
    told = run("torch-2024-10")
    assert "PyTorch" in told
    assert "SamplerConfig" not in told


def test_a_file_in_full():
    told = run(str(shipped_model() / "entropix.toml"))
    assert "jax-2024-10 with what is marked *" in told
    marked = [line.split()[1] for line in told.splitlines() if line.startswith("*")]
    assert marked == ["clarification.text", "thresholds.helv.varentropy_below"]
    assert "hmm, which one?" in told


def test_a_long_text_or_one_of_many_lines_stays_on_its_line(tmp_path):
    source = tmp_path / "given.json"
    source.write_text(json.dumps({"clarification": {"text": "one\ntwo\x1b[31m " + 100 * "long "}}))
    told = run(str(source))
    assert [line[2:].split()[0] for line in told.splitlines()[4:]] == NAMES
    assert max(len(line) for line in told.splitlines() if "clarification.text" not in line) < 320
    assert "\x1b" not in told


@pytest.mark.parametrize(
    "config",
    [EntropixConfig(), EntropixConfig.preset("torch-2024-10"), EntropixConfig.from_file(shipped_model() / "entropix.toml")],
)
def test_toml_to_start_from(tmp_path, config):
    source = tmp_path / "given.json"
    source.write_text(config.model_dump_json(by_alias=True))
    written = tmp_path / "written.toml"
    written.write_text(run("--toml", str(source)), encoding="utf-8")
    assert registry.load_server(str(written)) == registry.load_server(str(source))


@settings_of_hypothesis(max_examples=30)
@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=20).filter(lambda path: "\0" not in path))
def test_toml_of_any_text(text, path):
    settings = {"clarification": {"text": text}, "trace": {"path": f"{path}.jsonl"}}
    config = EntropixConfig.from_dict(settings)
    assert EntropixConfig.from_dict(tomllib.loads(toml(config))) == config


def test_toml_of_any_text_whatever_the_terminals_encoding(tmp_path):
    source = tmp_path / "given.json"
    text = 'a 🤔 "quoted" \\ line\r\nand \x00\x1f\x7f'
    source.write_text(json.dumps({"clarification": {"text": text}}))
    told = subprocess.run(
        [*COMMAND, "presets", "--toml", str(source)],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert tomllib.loads(told.stdout.decode())["clarification"]["text"] == text


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match=f"there are {', '.join(preset_names())}"):
        run("llama")
