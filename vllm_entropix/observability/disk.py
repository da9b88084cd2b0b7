"""Writes traces to disk from the frontend, in a thread of its own: whatever the disk does, no step waits for it.

A sequence that finished is queued as it is, in bytes; the thread makes a line of it (the JSON of ``tracefile.TraceLine``) and
writes what has gathered a few times a second. Lines that can't be written are dropped and counted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from vllm_entropix.config import ConfigError, Trace
from vllm_entropix.observability import prometheus
from vllm_entropix.observability.encoding import entries_json
from vllm_entropix.observability.tokens import token_texts
from vllm_entropix.observability.trace import FIELDS, TokenTrace
from vllm_entropix.observability.tracefile import VERSION, prompt_hash

FLUSH_SECONDS = 0.5
# Tokens that wait to be written, at about 100 bytes each; more are dropped.
MAX_WAITING_TOKENS = 500_000
MEGABYTE = 1_000_000
# Processes that share a folder: API servers, replicas.
_MAX_PROCESSES = 1000

logger = logging.getLogger("vllm.plugins.entropix")


@dataclass(frozen=True)
class Finished:
    """A sequence that finished, as the frontend has it.

    Attributes:
        label: what a line says of the engine and the settings, as :class:`~.tracefile.TraceLine` names it.
        request_id: of the request.
        index: number of the sequence in its request.
        prompt_token_ids: of which only a hash is written.
        token_ids: generated tokens.
        finish_reason: why generation ended.
        trace: records of the first of the tokens, or of all.
        tokenizer: a tokenizer of Hugging Face's or of the same interface; None leaves texts out.
    """

    label: dict[str, Any]
    request_id: str
    index: int
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    finish_reason: str | None
    trace: TokenTrace
    tokenizer: Any


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
        self._base = absolute(settings.path)
        self._limit = settings.max_megabytes * MEGABYTE
        self._files = settings.files
        self._counted = counted
        self._queue: deque[Finished] = deque()
        self._tokens = 0
        self._queue_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._arrived = threading.Event()
        self._warned = False
        self._file: int | None = None
        self.path = self._base
        # Runs at the end of main processes and of multiprocessing's, which skip atexit.
        Finalize(None, self.flush, exitpriority=10)
        threading.Thread(target=self._run, name="entropix-traces", daemon=True).start()

    def put(self, sequence: Finished) -> None:
        """Queue a sequence; drops it if too many wait. Never blocks for long."""
        tokens = 1 + len(sequence.token_ids)
        with self._queue_lock:
            full = self._tokens + tokens > MAX_WAITING_TOKENS
            if not full:
                self._tokens += tokens
                self._queue.append(sequence)
        if full:
            self._drop(1, "the disk is too slow")
        else:
            self._arrived.set()

    def flush(self) -> None:
        """Write everything that is queued, now."""
        with self._write_lock:
            self._arrived.clear()
            lines: list[bytes] = []
            size = 0
            while True:
                with self._queue_lock:
                    if not self._queue:
                        break
                    sequence = self._queue.popleft()
                    self._tokens -= 1 + len(sequence.token_ids)
                try:
                    line = line_of(sequence)
                except Exception as error:  # a tokenizer's, of any kind: tracing must not end with it
                    self._drop(1, f"{type(error).__name__}: {error}")
                    continue
                if len(line) > self._limit:
                    self._drop(1, f"it is longer than trace.max_megabytes ({len(line) / MEGABYTE:.1f} MB)")
                    continue
                lines.append(line)
                size += len(line)
                if size >= MEGABYTE:
                    self._write(lines)
                    lines, size = [], 0
            self._write(lines)

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            self._arrived.wait()
            pause.wait(FLUSH_SECONDS)
            self.flush()

    def _drop(self, lines: int, reason: str) -> None:
        self.dropped += lines
        if self._counted:
            prometheus.count_trace_lines(dropped=lines)
        if not self._warned:
            self._warned = True
            logger.warning(
                "Traces can't be written to %s (%s): they are dropped and counted, and serving goes on.", self.path, reason
            )

    def _write(self, lines: list[bytes]) -> None:
        """Append lines, all that fit a file at a time."""
        while lines:
            try:
                room = self._limit - self._open()
                fitting = _that_fit(lines, room)
                if not fitting:
                    self._rotate()
                    fitting = _that_fit(lines, self._limit)
                self._append(b"".join(lines[:fitting]))
            except OSError as error:
                self._close()  # so that the next lines find the file anew
                self._drop(len(lines), error.strerror or str(error))
                return
            self.written += fitting
            if self._counted:
                prometheus.count_trace_lines(written=fitting)
            lines = lines[fitting:]

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        before = os.fstat(self._file).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, before)  # no half lines
            raise

    def _open(self) -> int:
        """Open the file if it isn't, or if somebody has moved it away; its size."""
        if self._file is not None and not _is_at(self._file, self.path):
            self._close()
        if self._file is None:
            self._file, self.path = _open_free(self._base)
        return os.fstat(self._file).st_size

    def _rotate(self) -> None:
        if self._files == 1:
            self.path.unlink()
        else:
            for number in range(self._files - 2, 0, -1):
                older = _numbered(self.path, number)
                if older.exists():
                    older.replace(_numbered(self.path, number + 1))
            self.path.replace(_numbered(self.path, 1))
        self._close()
        self._open()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


_writers: dict[tuple[Trace, bool], TraceWriter] = {}


def writers() -> list[TraceWriter]:
    """All that this process writes with."""
    return list(_writers.values())


def write(settings: Trace, counted: bool, sequence: Finished) -> None:
    """Write a sequence soon, where the settings say."""
    writer = _writers.get((settings, counted))
    if writer is None:
        writer = _writers[settings, counted] = TraceWriter(settings, counted)
    writer.put(sequence)


def check(settings: Trace) -> None:
    """Create the file of traces if it isn't there; ConfigError if it couldn't be written."""
    if settings.path is None:
        return
    try:
        os.close(_open_file(absolute(settings.path)))
    except OSError as error:
        raise ConfigError(f"traces can't be written to trace.path {settings.path}: {error.strerror or error}") from None


def absolute(path: str) -> Path:
    """A path as a user gives it, which may be relative or start in a home folder."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def _that_fit(lines: list[bytes], room: int) -> int:
    """How many of the first lines fit into so many bytes."""
    fitting = 0
    for line in lines:
        room -= len(line)
        if room < 0:
            break
        fitting += 1
    return fitting


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
    """Open a file to append to, for its owner only; OSError if it is anything but a regular file, or a symbolic link."""
    # Non-blocking, for a named pipe would wait for its reader.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    file = os.open(path, flags, 0o600)
    try:
        mode = os.fstat(file).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("it isn't a regular file")
        if stat.S_IMODE(mode) != 0o600:
            os.fchmod(file, 0o600)
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
    """A sequence as a line of JSON, newline included: what ``TraceLine`` would make, without holding up other threads."""
    trace, token_ids = sequence.trace, list(sequence.token_ids)
    kept = min(len(trace), len(token_ids))
    values = trace.values()[:kept]
    texts, alternatives = _texts(sequence.tokenizer, token_ids, values[:, len(FIELDS) :])
    head = to_json(
        {
            "version": VERSION,
            "request_id": sequence.request_id,
            "index": sequence.index,
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **sequence.label,
            "prompt_hash": prompt_hash(sequence.prompt_token_ids),
            "prompt": None,
            "prompt_tokens": len(sequence.prompt_token_ids),
            "token_ids": token_ids,
            "texts": texts,
            "finish_reason": sequence.finish_reason,
            "not_kept": len(token_ids) - kept,
            "alternative_texts": alternatives,
        }
    )
    records = b"".join(entries_json(token_ids[:kept], values))
    return b'%b,"records":[%b]}\n' % (head[:-1], records)


def _texts(tokenizer: Any, token_ids: list[int], extra: np.ndarray) -> tuple[list[str], dict[int, str]]:
    """Texts of the tokens, and of the alternatives by id."""
    alternatives = np.unique(extra[:, : extra.shape[1] // 2]).astype(np.int64).tolist()
    if tokenizer is None:
        return [""] * len(token_ids), dict.fromkeys(alternatives, "")
    decoder = _Decoder(tokenizer)
    return token_texts(decoder, token_ids), {token: decoder.decode([token]) for token in alternatives}


class _Decoder:
    """A tokenizer that remembers the texts of single tokens, which are most of what is asked."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) > 1:
            return self._decode(token_ids)
        [token] = token_ids
        if token not in self._known:
            self._known[token] = self._decode(token_ids)
        return self._known[token]

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Said because tokenizers differ in what they do otherwise.
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
