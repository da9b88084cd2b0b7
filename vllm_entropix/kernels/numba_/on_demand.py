"""Kernels that few servers need: compiled when they are first asked for, while no request waits.

A compiler in a thread of the engine holds the interpreter's lock most of the time, for half a minute, and each operation of a
step would wait for it. So another process compiles, and a thread loads what that one has left on disk.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import threading
import time

from vllm_entropix.kernels.numba_.machine_code import kept_on_disk

logger = logging.getLogger("vllm.plugins.entropix")

# Steps go first.
_NICENESS = 10


class OnDemand:
    """Kernels of a module.

    Args:
        module: its name; its ``compile_for_steps()`` compiles them, or loads them from disk.
        what: the kernels, in what is logged.
        instead: what does their work until they are ready, or for good if they can't be had, in what is logged.
    """

    def __init__(self, module: str, what: str, instead: str) -> None:
        self._module, self._what, self._instead = module, what, instead
        self._asked = False
        self._ready = threading.Event()

    def ready(self) -> bool:
        """Are they? The first call has them compiled; none waits."""
        if not self._asked:
            self._asked = True
            try:
                threading.Thread(target=self._have_compiled, name="entropix-compiling", daemon=True).start()
            except RuntimeError as error:  # the system has no thread left
                self._tell(str(error))
        return self._ready.is_set()

    def _have_compiled(self) -> None:
        begin = time.monotonic()
        try:
            problem = _compile_elsewhere(self._module)
            if problem is None:
                importlib.import_module(self._module).compile_for_steps()
                self._ready.set()
        except Exception as error:  # whatever a compiler or the system raises
            problem = f"{type(error).__name__}: {error}"
        self._tell(problem, time.monotonic() - begin)

    def _tell(self, problem: str | None, seconds: float = 0.0) -> None:
        if problem is None:
            logger.info("entropix: %s is ready, %.1f s after the first request that can use it.", self._what, seconds)
        else:
            logger.warning("entropix: %s can't be compiled, so that %s: %s", self._what, self._instead, problem[:300])


def _compile_elsewhere(module: str) -> str | None:
    """Have another process leave a module's kernels on disk; why it can't."""
    if not kept_on_disk():
        return "no folder can keep them; set NUMBA_CACHE_DIR"
    program = f"from {__name__} import compile_here; compile_here({module!r})"
    # What this process may import, and nothing of the folder that it happens to run in.
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        stdin=subprocess.PIPE,  # which tells it that this process has ended
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        errors="replace",
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    if process.returncode == 0:
        return None
    return (said.strip().splitlines() or [f"the compiler ended with status {process.returncode}"])[-1]


def compile_here(module: str) -> None:
    """Compile a module's kernels as the process of :func:`_compile_elsewhere`, as long as the one that wants them is there."""
    os.nice(_NICENESS)
    threading.Thread(target=_end_with_input, daemon=True).start()
    importlib.import_module(module).compile_for_steps()


def _end_with_input() -> None:
    # Not by sys.stdin, whose lock an interpreter that ends would wait for.
    os.read(0, 1)
    os._exit(1)
