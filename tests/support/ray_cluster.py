"""A real Ray on this machine's CPUs, apart from everything else: processes and network of its own, gone when its driver ends.

Some of Ray's sockets listen on every address; in a network of its own there is only the loopback.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import runners

ROOT = Path(__file__).resolve().parents[2]
_APART = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


@functools.cache
def _prefix() -> list[str]:
    """What puts a command apart; nothing where that isn't allowed."""
    try:
        allowed = subprocess.run([*_APART, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    return [*_APART, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"] if allowed else []


def environment(folder: str, **extra: str) -> dict[str, str]:
    """For a process that starts Ray, and for all that Ray starts; its files and sockets are in this folder."""
    made = runners.environment("v1", ray=True)
    path = os.pathsep.join([str(ROOT), made["PYTHONPATH"]])
    return {
        **{name: value for name, value in made.items() if not name.startswith("VLLM_")},
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        **extra,
    }


@contextlib.contextmanager
def driver(log: Path, *arguments: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that starts Ray, its output in a file. Everything it started is dead when this is left."""
    # Not pytest's own: sockets have short names.
    folders = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
    with log.open("w") as output, folders as folder:
        process = subprocess.Popen(
            [*_prefix(), sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(folder, **env),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(log: Path, script: str, *arguments: Any, timeout: float = 300, **env: str) -> Any:
    """What a script of ``tests.ray`` printed as its result, in JSON behind the word RESULT."""
    with driver(log, "-m", f"tests.ray.{script}", *(json.dumps(argument) for argument in arguments), **env) as process:
        status = process.wait(timeout)
    text = log.read_text(errors="replace")
    _, found, rest = text.rpartition("RESULT ")
    assert status == 0, text[-5000:]
    assert found, text[-5000:]
    # What Ray's other processes have to say may follow on the same line.
    return json.JSONDecoder().raw_decode(rest)[0]
