"""Kernels that are compiled when they are first asked for, by another process."""

import subprocess
import sys
import time

import pytest

from vllm_entropix.kernels.numba_ import on_demand
from vllm_entropix.kernels.numba_.on_demand import OnDemand

SECONDS = 60


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Writes a module whose kernels are compiled by some lines of Python."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, *lines):
        (tmp_path / f"{name}.py").write_text("\n    ".join(["def compile_for_steps():", *lines]) + "\n")
        return OnDemand(name, "a kernel", "nobody does its work")

    return write


@pytest.fixture
def told(monkeypatch):
    """What is logged, whether or not vLLM has set the loggers up."""
    found = []
    for level in ("info", "warning"):
        monkeypatch.setattr(on_demand.logger, level, lambda text, *values: found.append(text % values))
    return found


def wait_for(what):
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_another_process_compiles_and_this_one_loads(kernels, tmp_path, told):
    note = "import os; open(os.path.join(os.path.dirname(__file__), 'by'), 'a').write(f'{os.getpid()} {os.nice(0)}\\n')"
    asked = kernels("compiled_elsewhere", note)
    assert not asked.ready()
    wait_for(asked.ready)
    wait_for(lambda: told)
    first, second = ([int(number) for number in line.split()] for line in (tmp_path / "by").read_text().splitlines())
    assert first[0] != second[0]
    assert first[1] > second[1]  # steps go first
    [message] = told
    assert message.startswith("entropix: a kernel is ready, ")


@pytest.mark.parametrize(
    ("line", "reason"),
    [("raise ValueError('no such type')", "ValueError: no such type"), ("import os; os._exit(7)", "ended with status 7")],
)
def test_what_cannot_be_compiled_is_told_once(kernels, told, line, reason):
    asked = kernels(f"never_compiled_{len(line)}", line)
    assert not asked.ready()
    wait_for(lambda: told)
    assert not asked.ready()
    [message] = told
    assert message.startswith("entropix: a kernel can't be compiled, so that nobody does its work: ")
    assert reason in message


def test_without_a_folder_nothing_is_compiled(kernels, monkeypatch, told):
    monkeypatch.setattr(on_demand, "kept_on_disk", lambda: False)
    asked = kernels("compiled_nowhere", "pass")
    asked.ready()
    wait_for(lambda: told)
    assert not asked.ready()
    assert "set NUMBA_CACHE_DIR" in told[0]


def test_the_compiler_ends_with_the_process_that_asked(kernels, tmp_path):
    kernels("compiled_for_ever", "import time; print('began', flush=True); time.sleep(600)")
    program = "import sys; sys.path.insert(0, sys.argv[1]); from vllm_entropix.kernels.numba_.on_demand import compile_here"
    command = [sys.executable, "-c", f"{program}; compile_here('compiled_for_ever')", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as compiler:
        try:
            assert compiler.stdout.readline() == b"began\n"
            compiler.stdin.close()
            assert compiler.wait(SECONDS) == 1
        finally:
            compiler.kill()
