"""Reads files of traces: JSON lines (``vllm_entropix.records.line``) or saved responses, packed or broken as they may be."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError
from pydantic_core import from_json

from vllm_entropix.observability.responses import Chunks, body_of, event, sequences
from vllm_entropix.records.line import TraceLine

_GZIP = b"\x1f\x8b"
_BUFFER = 1 << 16
# Lines that are named of those that are left out, and characters of what is wrong with them.
_NAMED = 5
_SHOWN = 100
logger = logging.getLogger(__name__)


class TraceFileError(ValueError):
    """A file that isn't a file of traces; the message is one sentence that names the file and the line."""


def read_traces(
    path: str | Path,
    progress: Callable[[int], object] | None = None,
    left_out: Callable[[int], object] | None = None,
    branches: bool = False,
) -> Iterator[TraceLine]:
    """The sequences of a file of traces, or of saved HTTP responses (see ``responses``), one after the other.

    Lines that aren't traces, such as those that a killed server left half written, are left out. One warning at the end tells
    how many, and which.

    Args:
        path: of the file, which may be compressed by gzip; ``-`` is standard input.
        progress: told how many bytes have been read, after each sequence.
        left_out: told at the end how many lines were left out.
        branches: also those branches of answers that forked which aren't the answer; they repeat what they share with it.

    Raises:
        TraceFileError: the file can't be read, or nothing in it is a trace of a version that this release knows.
    """
    reading = _Reading("standard input" if str(path) == "-" else str(path))
    try:
        with _opened(path) as (file, counted):
            for line in reading.sequences(file):
                if branches or line.is_answer:
                    yield line
                if progress is not None:
                    progress(counted.count)
    except OSError as error:
        raise TraceFileError(f"can't read {reading.name}: {error.strerror or error}") from None
    reading.tell()
    if left_out is not None:
        left_out(reading.bad)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[io.BufferedIOBase, _Counted]]:
    """A file's bytes, unpacked, and the count of those that have been read of it."""
    with contextlib.nullcontext(sys.stdin.buffer) if str(path) == "-" else Path(path).open("rb") as file:
        counted = _Counted(file)
        raw = io.BufferedReader(counted, _BUFFER)
        yield gzip.GzipFile(fileobj=raw) if raw.peek(len(_GZIP)).startswith(_GZIP) else raw, counted


class _Counted(io.RawIOBase):
    """Counts the bytes that are read of a file; standard input has no position to ask for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


class _Reading:
    """Reads a file's sequences, and remembers what couldn't be read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._line = 0
        self._good = 0
        self.bad = 0
        # (line, what is wrong with it), of the first.
        self._named: list[tuple[int, str]] = []

    def sequences(self, file: io.BufferedIOBase) -> Iterator[TraceLine]:
        """All that are in the file."""
        chunks = Chunks()
        for raw in self._lines(file):
            text = raw.strip()
            data = event(text)
            if not text:
                continue
            if self._line == 1 and text in (b"{", b"["):
                # A document over several lines, as tools write that make JSON readable.
                yield from self._of_json(raw + file.read())
            elif data is None:
                yield from self._of_json(text)
            elif data:
                self._add_chunk(data, chunks)
            elif text.startswith(b"data"):  # the end of a stream
                yield from self._valid(chunks.sequences())
        yield from self._valid(chunks.sequences())

    def _lines(self, file: io.BufferedIOBase) -> Iterator[bytes]:
        try:
            for raw in file:
                self._line += 1
                yield raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self._line += 1
            self._leave_out(f"broken gzip: {error}")

    def _of_json(self, text: bytes) -> Iterator[TraceLine]:
        """A trace, the choices of a response, or those of a list of either."""
        try:
            line = TraceLine.model_validate_json(text)
        except ValidationError as error:
            problem = _problem(error)
        except MemoryError:
            self._leave_out("too long for this machine's memory")
            return
        else:
            yield from self._valid((line,))
            return
        try:
            values = from_json(text)
        except ValueError:
            self._leave_out(problem)
            return
        for value in values if isinstance(values, list) else (values,):
            body = body_of(value)
            try:
                yield from self._valid((value,) if body is None else sequences(body))
            except ValueError as error:
                self._leave_out(_problem(error))

    def _add_chunk(self, data: bytes, chunks: Chunks) -> None:
        try:
            body = body_of(from_json(data))
            if body is not None:
                chunks.add(body)
        except ValueError as error:
            self._leave_out(_problem(error))

    def _valid(self, values: Iterable[Any]) -> Iterator[TraceLine]:
        for value in values:
            try:
                line = TraceLine.model_validate(value)
            except ValidationError as error:
                self._leave_out(_problem(error))
            else:
                self._good += 1
                yield line

    def _leave_out(self, problem: str) -> None:
        self.bad += 1
        if len(self._named) < _NAMED:
            self._named.append((self._line, problem))

    def tell(self) -> None:
        """Tell of what was left out; TraceFileError if nothing else was there."""
        if not self.bad:
            return
        first, problem = self._named[0]
        if not self._good:
            raise TraceFileError(f"{self.name}, line {first}: not a trace: {problem}")
        named = ", ".join(str(line) for line, _ in self._named)
        more = f" and {self.bad - len(self._named):,} more" if self.bad > len(self._named) else ""
        lines = f"line {named} isn't a trace and is" if self.bad == 1 else f"lines {named}{more} aren't traces and are"
        logger.warning("%s: %s left out (line %d: %s)", self.name, lines, first, problem)


def _problem(error: ValueError) -> str:
    """The first thing wrong, in a line that holds little of what a file can hold."""
    if not isinstance(error, ValidationError):
        return str(error)[:_SHOWN]
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))[:_SHOWN]
    message = first["msg"].removeprefix("Value error, ")[:_SHOWN]
    return f"{place}: {message}" if place else message
