"""A thread that nothing ends: whatever its work raises is told once and counted, and the next work is done."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable

logger = logging.getLogger("vllm.plugins.entropix")

_all: weakref.WeakSet[Background] = weakref.WeakSet()


class Background:
    """Does some work in a thread of its own, soon after it is asked to.

    Args:
        name: of the thread, and of the work in what is logged.
        work: takes nothing; may raise anything.
        pause: seconds from being asked to working, so that what comes together is done together.

    Attributes:
        failures: works that raised something.
    """

    def __init__(self, name: str, work: Callable[[], object], pause: float) -> None:
        self.failures = 0
        self._name, self._work, self._pause = name, work, pause
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._asked, self._hurried, self._done = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Have the work done soon; takes no time."""
        if not self._asked.is_set():
            self._asked.set()
            if self._thread is None or not self._thread.is_alive():
                self._start()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no thread left, or the interpreter is ending
            self._asked.clear()
            self._failed(error)
        else:
            self._thread = thread

    def hurry(self) -> threading.Event:
        """Have all that was asked for done now, and whatever follows without a pause; set when it is done."""
        self.ask()
        self._hurried.set()
        return self._done

    def _run(self) -> None:
        while True:
            self._asked.wait()
            self._hurried.wait(self._pause)
            self._asked.clear()
            try:
                self._work()
            except BaseException as error:  # also a panic in Rust, which is no Exception
                self._failed(error)
            if self._hurried.is_set() and not self._asked.is_set():
                self._done.set()

    def _failed(self, error: BaseException) -> None:
        self.failures += 1
        if self.failures == 1:
            logger.error(
                "The thread %s goes on after %s: %s. What it was about is lost; later errors are counted and not logged.",
                self._name,
                type(error).__name__,
                error,
            )


def _after_fork() -> None:
    # A child has its parent's objects and none of its threads.
    for background in _all:
        background._begin()


os.register_at_fork(after_in_child=_after_fork)
