"""Writes traces to disk from the frontend, in a thread of its own: whatever the disk does, no step waits for it.

A sequence that finished is queued as it is, in bytes; the thread makes a line of it (the JSON of ``records.line.TraceLine``)
and writes what has gathered a few times a second. Lines that can't be written are dropped and counted. So are those that find
more than ``trace.queue_megabytes`` waiting.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from vllm_entropix.observability import prometheus
from vllm_entropix.observability.background import Background
from vllm_entropix.records.branches import Branch
from vllm_entropix.records.encoding import PART, entries_json
from vllm_entropix.records.fields import all_fields
from vllm_entropix.records.line import VERSION, prompt_hash
from vllm_entropix.records.scores import Tally
from vllm_entropix.records.tokens import token_texts
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.settings.errors import ConfigError
from vllm_entropix.settings.server import Trace

FLUSH_SECONDS = 0.5
# How long the end of a process waits for a disk that takes nothing.
EXIT_SECONDS = 5.0
MEGABYTE = 1_000_000
# Processes that share a folder: API servers, replicas.
_MAX_PROCESSES = 1000
# Bytes of what a sequence in the queue holds beside its tokens, records and prompt.
_OVERHEAD = 4096
_TOKEN_BYTES = 8
# Bytes that are written at a time, about.
_BLOCK = 1 << 18

logger = logging.getLogger("vllm.plugins.entropix")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a line tells of a prompt, and what it takes to tell it.

    Attributes:
        hash: see ``records.line.prompt_hash``.
        tokens: their number.
        text: None unless ``trace.prompts`` is on.
        token_ids: where there is no text, to make it of; None unless ``trace.prompts`` is on.
    """

    hash: str
    tokens: int
    text: str | None = None
    token_ids: array[int] | None = None

    @classmethod
    def from_ids(cls, token_ids: Sequence[int], text: str | None, told: bool) -> Prompt:
        """A prompt as the frontend has it; ``told``: the text is to be written, too."""
        known = prompt_hash(token_ids), len(token_ids)
        if not told:
            return cls(*known)
        return cls(*known, text) if text is not None else cls(*known, token_ids=compact(token_ids))

    @property
    def nbytes(self) -> int:
        """What it takes in memory, about."""
        return 4 * len(self.text or "") + _TOKEN_BYTES * len(self.token_ids or ())


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence that finished, in few bytes.

    Attributes:
        label: what a line says of the engine and the settings, as :class:`~vllm_entropix.records.line.TraceLine` names it.
        request_id: of the request.
        index: number of the sequence in its request.
        prompt: what is told of it.
        token_ids: generated tokens.
        finish_reason: why generation ended.
        trace: records of the first of the tokens, or of all.
        tokenizer: a tokenizer of Hugging Face's or of the same interface; None leaves texts out.
        scores: of the answer, as JSON values, where they were asked for.
        branch: which branch of an answer that forked it is; None: the answer didn't fork.
        forks: all branches of that answer, if it is the answer.
    """

    label: dict[str, Any]
    request_id: str
    index: int
    prompt: Prompt
    token_ids: array[int]
    finish_reason: str | None
    trace: TokenTrace
    tokenizer: Any
    scores: dict[str, Any] | None = None
    branch: Branch | None = None
    forks: Sequence[Branch] | None = None

    @property
    def nbytes(self) -> int:
        """What it takes in memory, about."""
        return _OVERHEAD + self.prompt.nbytes + _TOKEN_BYTES * len(self.token_ids) + self.trace.nbytes


def compact(token_ids: Sequence[int]) -> array[int]:
    """Token ids in 8 bytes each; as Python's integers they take 36."""
    return array("q", struct.pack(f"{len(token_ids)}q", *token_ids))  # ten times as fast as of the integers


class TraceWriter:
    """One file of traces and the thread that writes it.

    The file is ``path``, or ``name-1.suffix`` and so on if another process is writing that already. When full it becomes
    ``path.1``, the one before ``path.2``, and so on.

    Args:
        settings: with a path.
        counted: tell Prometheus of lines that were written and dropped.
    """

    def __init__(self, settings: Trace, counted: bool = True) -> None:
        assert settings.path is not None
        self.dropped = 0
        self.written = 0
        self.path = self._base = absolute(settings.path)
        self._limit = settings.max_megabytes * MEGABYTE
        self._files = settings.files
        self._counted = counted
        self._queue: deque[Finished] = deque()
        self._queue_limit = settings.queue_megabytes * MEGABYTE
        self._queued = 0
        self._queue_lock = threading.Lock()
        self._write_lock = threading.Lock()
        # Grows while something is made or written.
        self.progress = 0
        self._warned: set[str] = set()
        self._file: int | None = None
        self.background = Background("entropix-traces", self.flush, FLUSH_SECONDS)

    def put(self, sequence: Finished) -> None:
        """Queue a sequence; drops it if too many wait. Never blocks for long."""
        size = sequence.nbytes
        with self._queue_lock:
            full = self._queued + size > self._queue_limit
            if not full:
                self._queued += size
                self._queue.append(sequence)
        if full:
            self._drop(1, "queue", f"more than trace.queue_megabytes = {self._queue_limit // MEGABYTE} wait to be written")
        else:
            self.background.ask()

    def flush(self) -> None:
        """Write everything that is queued, now."""
        with self._write_lock:
            lines: list[_Line] = []
            size = 0
            while True:
                with self._queue_lock:
                    if not self._queue:
                        break
                    sequence = self._queue.popleft()
                    self._queued -= sequence.nbytes
                try:
                    line = self._line(sequence)
                except BaseException as error:  # a tokenizer's, of any kind: tracing must not end with it
                    self._drop(1, type(error).__name__, f"{type(error).__name__}: {error}")
                    continue
                if line.size > self._limit:
                    self._drop(1, "size", f"one is longer than trace.max_megabytes: {line.size / MEGABYTE:.1f} MB")
                    continue
                lines.append(line)
                size += line.size
                if size >= MEGABYTE:
                    self._write(lines)
                    lines, size = [], 0
            self._write(lines)

    def _line(self, sequence: Finished) -> _Line:
        line = _Line()
        for part in line_parts(sequence):
            line.add(part)
            self.progress += 1
            time.sleep(0)  # lets the thread that serves go on
        return line

    def _drop(self, lines: int, kind: str, reason: str) -> None:
        self.dropped += lines
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(
                "Traces can't be written to %s (%s): they are dropped and counted, and serving goes on.",
                self.path,
                reason[:200],
            )
        self._count(dropped=lines)

    def _count(self, **lines: int) -> None:
        if self._counted:
            try:
                prometheus.count_trace_lines(**lines)
            except Exception as error:  # its files may lie on a full disk
                if "counting" not in self._warned:
                    self._warned.add("counting")
                    logger.warning("Lines of traces can't be counted for /metrics: %s: %s", type(error).__name__, error)

    def _write(self, lines: list[_Line]) -> None:
        """Append lines; those after one that can't be written are dropped with it."""
        written = 0
        try:
            size = self._open() if lines else 0
            for line in lines:
                if size + line.size > self._limit:
                    size = self._rotate()
                self._append(line)
                size += line.size
                written += 1
        except BaseException as error:  # a full disk, mostly
            self._close()  # so that the next lines find the file anew
            self._drop(len(lines) - written, type(error).__name__, getattr(error, "strerror", None) or repr(error))
        self.written += written
        if written:
            self._count(written=written)

    def _append(self, line: _Line) -> None:
        assert self._file is not None
        before = os.fstat(self._file).st_size
        try:
            for block in line.blocks():
                rest = memoryview(block)
                while rest:
                    rest = rest[os.write(self._file, rest) :]
                    self.progress += 1
        except BaseException:
            os.ftruncate(self._file, before)  # no half lines
            raise

    def _open(self) -> int:
        """Open the file if it isn't, or if somebody has moved it away; its size."""
        if self._file is not None and not _is_at(self._file, self.path):
            self._close()
        if self._file is None:
            self._file, self.path = _open_free(self._base)
        return os.fstat(self._file).st_size

    def _rotate(self) -> int:
        """Set the file aside and begin another, which the same users may read; its size."""
        assert self._file is not None
        mode = stat.S_IMODE(os.fstat(self._file).st_mode)
        if self._files == 1:
            self.path.unlink()
        else:
            for number in range(self._files - 2, 0, -1):
                older = _numbered(self.path, number)
                if older.exists():
                    older.replace(_numbered(self.path, number + 1))
            self.path.replace(_numbered(self.path, 1))
        self._close()
        size = self._open()
        os.fchmod(self._file, mode)
        return size

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # of what was written before, which nothing can be done about
                os.close(file)


class _Line:
    """A line in blocks: a long one is never moved in one go, which would hold up other threads."""

    def __init__(self) -> None:
        self.size = 0
        self._blocks: list[bytes] = []
        self._parts: list[bytes] = []
        self._waiting = 0

    def add(self, part: bytes) -> None:
        self._parts.append(part)
        self.size += len(part)
        self._waiting += len(part)
        if self._waiting >= _BLOCK:
            self._blocks.append(b"".join(self._parts))
            self._parts, self._waiting = [], 0

    def blocks(self) -> list[bytes]:
        return [*self._blocks, b"".join(self._parts)]


_writers: dict[tuple[Trace, bool], TraceWriter] = {}


def writers() -> list[TraceWriter]:
    """The writers of this process."""
    return list(_writers.values())


def write(settings: Trace, counted: bool, sequence: Finished) -> None:
    """Write a sequence soon, where the settings say."""
    writer = _writers.get((settings, counted))
    if writer is None:
        if not _writers:
            # Runs at the end of main processes and of multiprocessing's, which skip atexit.
            Finalize(None, lambda: finish(writers()), exitpriority=10)
        writer = _writers[settings, counted] = TraceWriter(settings, counted)
    writer.put(sequence)


def finish(unfinished: Sequence[TraceWriter]) -> None:
    """Wait until all that is queued is written, or until the disks have taken nothing for EXIT_SECONDS."""
    done = {writer: writer.background.hurry() for writer in unfinished}
    progress, since = -1, time.monotonic()
    while waiting := [writer for writer in unfinished if not done[writer].wait(0.02)]:
        before, progress = progress, sum(writer.progress for writer in waiting)
        if progress != before:
            since = time.monotonic()
        elif time.monotonic() - since > EXIT_SECONDS:
            for writer in waiting:
                logger.warning("Traces that wait for %s are lost: nothing was written for %g s.", writer.path, EXIT_SECONDS)
            return


def _after_fork() -> None:
    # What waits is the parent's to write, and so are its files.
    for writer in writers():
        writer._close()
    _writers.clear()


os.register_at_fork(after_in_child=_after_fork)


def check(settings: Trace) -> None:
    """Create the file of traces if it isn't there, warn if others can read it; ConfigError if it couldn't be written."""
    if settings.path is None:
        return
    try:
        file = _open_file(absolute(settings.path))
        mode = stat.S_IMODE(os.fstat(file).st_mode)
        os.close(file)
    except OSError as error:
        raise ConfigError(f"traces can't be written to trace.path {settings.path}: {error.strerror or error}") from None
    if mode & stat.S_IROTH:
        logger.warning(
            "Traces hold what was generated, and any user of this machine can read %s (mode %o): chmod 600 changes that.",
            settings.path,
            mode,
        )


def absolute(path: str) -> Path:
    """A path as a user gives it, which may be relative or start in a home folder."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _is_at(file: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(file)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _open_file(path: Path) -> int:
    """Open a file to append to; OSError if it is anything but a regular file, or a symbolic link.

    A new file is for its owner only. The mode of one that is there is the operator's.
    """
    # Non-blocking, for a named pipe would wait for its reader.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    file = os.open(path, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError("it isn't a regular file")
    except OSError:
        os.close(file)
        raise
    return file


def _open_free(base: Path) -> tuple[int, Path]:
    """Open and lock the first of the names that no other process is writing."""
    for number in range(_MAX_PROCESSES):
        path = base if number == 0 else base.with_name(f"{base.stem}-{number}{base.suffix}")
        file = _open_file(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                os.write(file, b"\n")  # a process was killed while it wrote
        except BlockingIOError:
            os.close(file)
            continue
        except OSError:
            os.close(file)
            raise
        return file, path
    raise OSError(f"{_MAX_PROCESSES} processes are writing traces there already")


def line_of(sequence: Finished) -> bytes:
    """A sequence as a line of JSON, newline included: what ``TraceLine`` would make."""
    return b"".join(line_parts(sequence))


def line_parts(sequence: Finished) -> Iterator[bytes]:
    """The same in parts, none of which takes longer than a millisecond or so."""
    token_ids = sequence.token_ids
    kept = min(len(sequence.trace), len(token_ids))
    values = sequence.trace.values()[:kept]
    alternatives = values[:, len(all_fields()) :]
    decoder = _Decoder(sequence.tokenizer)
    head = {
        "version": VERSION,
        "request_id": sequence.request_id,
        "index": sequence.index,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **sequence.label,
        "prompt_hash": sequence.prompt.hash,
        "prompt": decoder.prompt(sequence.prompt),
        "prompt_tokens": sequence.prompt.tokens,
        "finish_reason": sequence.finish_reason,
        "not_kept": len(token_ids) - kept,
        "scores": _scores(sequence, kept),
        "branch": None if sequence.branch is None else sequence.branch.model_dump(mode="json"),
        "forks": None if sequence.forks is None else [branch.model_dump(mode="json") for branch in sequence.forks],
    }
    yield to_json(head)[:-1]
    yield b',"token_ids":['
    yield from _joined(_parts(token_ids))
    yield b'],"texts":['
    yield from _joined(_parts(decoder.texts(token_ids)))
    yield b'],"alternative_texts":{'
    yield from _joined(decoder.new_texts(alternatives[start : start + PART]) for start in range(0, kept, PART))
    yield b'},"records":['
    yield from entries_json(token_ids[:kept], values)
    yield b"]}\n"


def _scores(sequence: Finished, kept: int) -> dict[str, Any] | None:
    """Scores of all tokens: those that were gathered, or else of the records, if no token lacks one."""
    if sequence.scores is not None or kept < len(sequence.token_ids):
        return sequence.scores
    tally = Tally()
    tally.add_values(sequence.trace.values()[:kept])
    return tally.values()


def _parts(values: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(values)
    while part := list(islice(rest, PART)):
        yield part


def _joined(parts: Iterable[list[Any] | dict[int, str]]) -> Iterator[bytes]:
    """JSON lists, or objects, as one and without brackets."""
    comma = b""
    for part in parts:
        if part:
            yield comma + to_json(part)[1:-1]
            comma = b","


class _Decoder:
    """A tokenizer that remembers the texts of single tokens, which are most of what is asked; all empty without one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._told: set[int] = set()

    def decode(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) > 1:
            return self._decode(token_ids)
        [token] = token_ids
        if token not in self._known:
            self._known[token] = self._decode(token_ids)
        return self._known[token]

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        # Said because tokenizers differ in what they do otherwise.
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def prompt(self, prompt: Prompt) -> str | None:
        """Its text, if that is to be told."""
        if prompt.token_ids is None or self._tokenizer is None:
            return prompt.text
        return self._decode(prompt.token_ids)

    def texts(self, token_ids: Sequence[int]) -> Iterator[str]:
        """Text of each token."""
        return token_texts(self, token_ids)

    def new_texts(self, alternatives: np.ndarray) -> dict[int, str]:
        """Texts by id, of those alternatives that haven't been asked for before.

        Args:
            alternatives: float32 ``[tokens, 2·alternatives]``: ids, then probabilities.
        """
        found = set(alternatives[:, : alternatives.shape[1] // 2].astype(np.int64).ravel().tolist()) - self._told
        self._told |= found
        return {token: self.decode([token]) for token in sorted(found)}
