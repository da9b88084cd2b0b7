"""Judging answers with a limit on the time that one may take: what hangs is ended, and counts as wrong."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from vllm_entropix.bench.tasks.base import Graded, Item, Task
from vllm_entropix.settings.errors import cut

SECONDS = 20.0


class Grader:
    """A process that judges answers, begun again whenever an answer hangs or kills it.

    Args:
        tasks: by name, as :meth:`grade` is told.
        seconds: that one answer may take.
    """

    def __init__(self, tasks: Mapping[str, Task[Any]], seconds: float = SECONDS) -> None:
        self._tasks, self._seconds = dict(tasks), seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def grade(self, task: str, item: Item, text: str) -> Graded:
        """Judge an answer. One that takes too long, or that the task's rule fails on, is wrong and has a note."""
        pipe = self._running()
        try:
            pipe.send((task, item, text))
            if pipe.poll(self._seconds):
                found: Graded = pipe.recv()
                return found
            problem = f"judging took longer than {self._seconds:g} s"
        except (EOFError, OSError):
            problem = "judging ended its process"
        self._end()
        return Graded(None, False, problem)

    def _running(self) -> Connection:
        if self._pipe is None:
            # A fresh interpreter: the asking process has threads.
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._tasks), daemon=True)
            self._process.start()
            theirs.close()
        return self._pipe

    def _end(self) -> None:
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


def _serve(pipe: Connection, tasks: dict[str, Task[Any]]) -> None:
    while True:
        try:
            task, item, text = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            graded = tasks[task].grade(item, text)
        except Exception as error:
            graded = Graded(None, False, f"judging failed: {cut(f'{type(error).__name__}: {error}', 200)}")
        pipe.send(graded)
