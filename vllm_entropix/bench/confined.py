"""Python source that a model wrote, run in a process of its own: limited time and memory, no network, no files, no processes.

The limits are the kernel's where it has them; the rest is refused by an audit hook of the interpreter. They stop accidents and
what a language model writes without being asked. They are no jail: somebody who wants to get out of them can.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

SECONDS = 5
MEMORY_BYTES = 512 << 20
# Of each file, what is told of an error included.
FILE_BYTES = 1 << 20
# Of a process that came to the end of the source, which sys.exit() doesn't.
_ENDED = 42

# -I keeps out the environment and the user's packages, -S those of the installation.
_ARGUMENTS = ("-I", "-S", "-X", "utf8", "-c")
_GUARD = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS + 1}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_BYTES}, {FILE_BYTES}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
source = sys.stdin.read()
allowed = ("os.listdir", "os.scandir", "os.stat", "os.fspath")
refused = ("socket.", "subprocess.", "ctypes.", "os.", "shutil.", "pty.", "signal.", "resource.", "webbrowser.", "ftplib.",
           "http.", "smtplib.", "urllib.", "sqlite3.", "_posixsubprocess.", "_winapi.", "pathlib.", "tempfile.", "glob.")
def hook(event, arguments, allowed=allowed, refused=refused):
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        if (mode and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3):
            raise PermissionError("files can't be written here")
    elif event.startswith(refused) and event not in allowed:
        raise PermissionError(event + " can't be used here")
sys.addaudithook(hook)
exec(compile(source, "answer.py", "exec"), {{"__name__": "answer"}})
os._exit({_ENDED})
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended.

    Attributes:
        succeeded: it came to its end.
        problem: the last line of what went wrong; empty if nothing did.
    """

    succeeded: bool
    problem: str = ""


def run_python(source: str, seconds: float = SECONDS) -> Ended:
    """Run source to its end, or until a limit is met.

    Args:
        source: what to run; read as UTF-8, and what can't be written as that is replaced.
        seconds: by the clock; the process's own time is limited to SECONDS.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, *_ARGUMENTS, _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=told,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(source.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Ended(False, f"took longer than {seconds:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        if process.returncode == _ENDED:
            return Ended(True)
        if process.returncode == -signal.SIGXCPU:  # before the clock's limit, where this process was late to look at it
            return Ended(False, f"took longer than {SECONDS:g} s")
        told.seek(max(0, told.seek(0, os.SEEK_END) - 2000))
        lines = told.read().decode("utf-8", "replace").strip().splitlines()
        return Ended(False, lines[-1][:200] if lines else f"ended with status {process.returncode}")
