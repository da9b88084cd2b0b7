"""A real `vllm serve` in a process of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

VLLM = Path(sys.executable).parent / "vllm"
START_SECONDS = 420  # seven processes that import vLLM, and others at work on the same cores
THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"  # where tests run side by side (tests/conftest.py)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a server process: as a user has it, without this test process's own settings."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_") or name == THREADS_BIND}
    return {**ours, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1", **extra}


def free_port() -> int:
    """A port on the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server(NamedTuple):
    """A server that has answered."""

    url: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def serve(model: Any, log: Path, *arguments: str, **env: str) -> Iterator[str]:
    """Serve a model; gives the base URL once it answers."""
    with serve_process(model, log, *arguments, **env) as server:
        yield server.url


@contextlib.contextmanager
def serve_process(model: Any, log: Path, *arguments: str, prefix: Sequence[str] = (), **env: str) -> Iterator[Server]:
    """Serve a model; gives the server once it answers. It may have ended when this is left.

    Args:
        model: folder of the model.
        log: file for the server's output.
        arguments: further ones of `vllm serve`.
        prefix: command that becomes the server by exec.
        env: what differs from this process's environment.
    """
    port = free_port()
    command = [*prefix, str(VLLM), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(**env), start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_SECONDS
            while True:
                if process.poll() is not None:
                    raise AssertionError(f"the server ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
                if time.monotonic() > deadline:
                    raise AssertionError(f"no answer after {START_SECONDS} s:\n{log.read_text()[-3000:]}")
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=2).close()
                    break
                time.sleep(0.5)
            yield Server(url, process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_vllm(*arguments: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
    """`vllm` with these arguments, to its end."""
    return subprocess.run(
        [str(VLLM), *arguments], capture_output=True, text=True, timeout=timeout, env=environment(**env), check=False
    )


def result_of(script: str, *arguments: Any, timeout: float = 300, **env: str) -> Any:
    """What a script of this folder prints as its result, in JSON behind the word RESULT, in a process with this environment."""
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**env),
        check=False,
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert lines, ended.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def generate_in_process(model: Any, arguments: dict[str, Any], requests: list[Any], **env: str) -> list[Any]:
    """What ``generate_script`` gives, in a process with this environment."""
    return result_of("generate_script", model, json.dumps(arguments), json.dumps(requests), **env)
