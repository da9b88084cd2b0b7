"""What all commands share: help, versions, completion, and errors that are one sentence."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from vllm_entropix._version import __version__
from vllm_entropix.cli import main as module
from vllm_entropix.cli.calibrate import _asked
from vllm_entropix.cli.demo import Prompt
from vllm_entropix.cli.main import app, main
from vllm_entropix.settings.errors import ConfigError

COMMANDS = sorted(command.name for command in app.registered_commands)
READERS = ("report {} -o {out}", "whatif {} --preset jax-2024-10", "export {} -o {out}", "calibrate demo --prompts {}")


def run(*arguments, **options):
    """The command as a process."""
    return subprocess.run(
        [sys.executable, "-m", "vllm_entropix", *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )


def refused(monkeypatch, capsys, *arguments):
    """The sentence that the command ends with, which has status 1."""
    monkeypatch.setattr(sys, "argv", ["vllm-entropix", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    # sys.exit(text) writes it to stderr when the interpreter ends, with status 1.
    sentence = ended.value.code
    assert isinstance(sentence, str)
    assert sentence.startswith("vllm-entropix: ")
    assert "\n" not in sentence
    assert capsys.readouterr().out == ""
    return sentence


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_of_every_command(command, option):
    ended = CliRunner().invoke(app, [command, option])
    assert ended.exit_code == 0
    assert "Usage: " in ended.output
    assert command in ended.output


def test_it_runs_as_a_module_too():
    ended = run("--version")
    assert (ended.returncode, ended.stdout) == (0, f"vllm-entropix {__version__}\n")


def test_completion_for_the_shell():
    told = CliRunner().invoke(app, ["--help"]).output
    assert "--install-completion" in told
    assert "--show-completion" in told


def test_wrong_usage_has_status_2():
    for arguments in (["whatif"], ["presets", "--nonsense"], ["nonsense"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "empty", "not allowed"])
def test_files_that_cant_be_read(command, kind, tmp_path, monkeypatch, capsys):
    if (command[:6], kind) == ("export", "empty"):
        return  # a table without rows is one
    path = tmp_path / ("given.txt" if "calibrate" in command else "given.jsonl")
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 4)
    elif kind == "empty":
        path.touch()
    elif kind == "not allowed":
        # Whoever runs the tests may be allowed everything; memory that isn't mapped can be read by nobody.
        path = "/proc/self/mem"
    output = tmp_path / ("out.html" if "report" in command else "out.csv")
    arguments = command.format(path, out=output).split()
    sentence = refused(monkeypatch, capsys, *arguments)
    if kind != "empty":
        assert str(path) in sentence
    assert not output.exists()


@pytest.mark.parametrize("command", ["presets", "schema"])
def test_a_full_disk(command, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with which nothing is left to write when the process ends
    program = [sys.executable, "-m", "vllm_entropix", command]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "vllm-entropix: No space left on device\n"


def test_a_pipe_that_is_closed():
    line = f"{sys.executable} -m vllm_entropix presets --markdown | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("1\n", "")


def test_an_interrupt(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", [["demo"], ["calibrate", "demo"]], ids=["demo", "calibrate"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("not here.txt", "No such file or directory"), (".", "Is a directory"), ("latin.txt", "not UTF-8 text")],
)
def test_prompts_that_cant_be_read(command, name, reason, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    monkeypatch.setattr(sys, "argv", ["vllm-entropix", *command, "--prompts", name])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == f"vllm-entropix: can't read the prompts in {name}: {reason}"


@pytest.mark.parametrize("command", [["demo", "--model"], ["calibrate", "--prompts", "prompts.txt"]], ids=["demo", "calibrate"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("no/such/folder", "there is no folder no/such/folder"),
        ("prompts.txt", "prompts.txt is a file"),
        ("empty", "config.json"),
    ],
)
def test_a_model_that_isnt_there(command, model, reason, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("Once upon a time\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["vllm-entropix", *command, model])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code.startswith("vllm-entropix: ")
    assert reason in ended.value.code


@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        (
            "torch",
            ["whatif", "given.jsonl", "--preset", "jax-2024-10"],
            "install vllm-entropix[cuda] or vllm-entropix[cpu]",
        ),
        ("pandas", ["export", "given.jsonl", "-o", "out.csv"], "install vllm-entropix[report]"),
        ("vllm", ["calibrate", "demo", "--prompts", "given.txt"], "vLLM"),
        ("torch", ["calibrate", "demo", "--prompts", "given.txt"], "torch isn't installed"),
    ],
)
def test_what_isnt_installed(missing, arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.txt").write_text("Once upon a time\n")
    (tmp_path / "given.jsonl").touch()
    program = f"import sys; sys.modules[{missing!r}] = None; from vllm_entropix.cli.main import main; main()"
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_terminal_that_lacks_signs():
    # The frames of rich's tables.
    ended = run("--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("missing", ["tomli_w", "rich"])
def test_a_requirement_that_is_missing(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; from vllm_entropix.cli.start import main; main()"
    ended = subprocess.run([sys.executable, "-c", program, "presets"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"vllm-entropix: {missing}")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("template", "chat", "how"),
    [
        ("{}", None, "Prompts go through the model's chat template."),
        ("{}", True, "Prompts go through the model's chat template."),
        ("{}", False, "Prompts are texts that the model continues: --no-chat was given."),
        (None, None, "Prompts are texts that the model continues: the model has no chat template."),
        (None, False, "Prompts are texts that the model continues: the model has no chat template."),
    ],
)
def test_a_calibration_asks_as_it_says(template, chat, how):
    llm = SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(chat_template=template))
    said = [{"role": "user", "content": "Hello"}]
    asked, told = _asked(llm, [Prompt("text", text="Hello"), Prompt("chat", messages=said)], chat)
    assert told == how
    if "template." in how and template:
        assert [prompt.messages for prompt in asked] == [said, said]
        assert [prompt.text for prompt in asked] == [None, None]
    else:
        assert [prompt.text for prompt in asked] == ["Hello", "Hello\n"]
        assert [prompt.messages for prompt in asked] == [None, None]


def test_a_chat_template_that_isnt_there_is_refused():
    llm = SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(chat_template=None))
    with pytest.raises(ConfigError, match=r"^--chat is given, but the model has no chat template; leave it out$"):
        _asked(llm, [Prompt("text", text="Hello")], True)


def test_a_preset_without_regimes_is_calibrated_by_nobody(monkeypatch, capsys):
    sentence = refused(monkeypatch, capsys, "calibrate", "demo", "--base", "signals")
    assert sentence.endswith("--base is signals, which switches regimes off; name another preset")
