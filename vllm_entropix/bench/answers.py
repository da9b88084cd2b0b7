"""The results' folder: a line of JSON per answer, from which a study goes on wherever it was stopped."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_entropix.bench.machine import described
from vllm_entropix.bench.study import Phase, Study, Value
from vllm_entropix.settings.errors import ConfigError, cut

ANSWERS, STUDY, SESSIONS = "answers.jsonl", "study.json", "sessions.jsonl"


class Key(NamedTuple):
    """Which answer it is. No two of a study have the same."""

    model: str
    phase: Phase
    sampler: str
    configuration: int
    task: str
    item: str
    draw: int


class Answer(BaseModel):
    """One answer, as its line tells it.

    Attributes:
        model: name of the model in the study.
        phase: tuning or test.
        sampler: name of the arm in the study.
        configuration: which of the sampler's configurations.
        task: name of the task in the study.
        item: id within the task.
        draw: from 0.
        seed: of the request.
        parameters: of the configuration.
        text: what the model wrote.
        finish_reason: `length` where the limit cut it.
        tokens: of the text.
        answer: what the task's rule took out of the text.
        correct: whether it is right; None where nothing is right or wrong.
        note: why it couldn't be judged as usual.
        signals: scores of the answer, and its mean temperature.
        seconds: from the request to the answer, beside all others.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    phase: Phase
    sampler: str
    configuration: int
    task: str
    item: str
    draw: int
    seed: int
    parameters: dict[str, Value]
    text: str
    finish_reason: str
    tokens: int
    answer: str | None
    correct: bool | None
    note: str = ""
    signals: dict[str, float] = Field(default_factory=dict)
    seconds: float

    @property
    def key(self) -> Key:
        """Which answer it is."""
        return Key(self.model, self.phase, self.sampler, self.configuration, self.task, self.item, self.draw)


def read(folder: Path) -> Iterator[Answer]:
    """The answers in a folder, also compressed ones; of a file that is being written, the whole lines.

    Raises:
        ConfigError: there are none, or a line isn't an answer.
    """
    plain, compressed = folder / ANSWERS, folder / f"{ANSWERS}.gz"
    path = plain if plain.exists() else compressed
    if not path.exists():
        raise ConfigError(f"{folder} has no {ANSWERS}; give the folder that `vllm-entropix bench STUDY.toml -o` wrote")
    with gzip.open(path, "rb") if path is compressed else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield Answer.model_validate_json(line)
            except ValidationError as error:
                raise ConfigError(f"line {number} of {path} is no answer: {cut(error.errors()[0]['msg'])}") from None


class Store:
    """The folder of a study that runs.

    One process at a time writes there; a line that was begun when another was stopped is taken out.

    Args:
        folder: made if it isn't there.
        study: that runs.

    Raises:
        ConfigError: the folder has another study's results, or another process writes there.
    """

    def __init__(self, folder: Path, study: Study) -> None:
        self._path = folder / ANSWERS
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process writes to {folder}; wait for it to end, or choose another folder") from None
        if self._path.exists():
            self._drop_unfinished_line()
        self._check(folder / STUDY, study)
        self.known: dict[Key, Answer] = {answer.key: answer for answer in (read(folder) if self._path.exists() else ())}
        with (folder / SESSIONS).open("a", encoding="utf-8") as sessions:
            sessions.write(json.dumps(described()) + "\n")
        self._file: IO[bytes] = self._path.open("ab", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._lock.close()

    def add(self, answer: Answer) -> None:
        """Keep an answer; ConfigError if the disk doesn't take it.

        Raises:
            ConfigError: the disk doesn't take it. What was written before stays, and a study goes on from there.
        """
        line = answer.model_dump_json().encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):  # what a disk that is almost full takes; the next write would say so
                raise OSError(28, os.strerror(28))
        except OSError as error:
            raise ConfigError(
                f"can't write to {self._path}: {error.strerror}; make room, and the same command goes on from here"
            ) from None
        self.known[answer.key] = answer

    def _drop_unfinished_line(self) -> None:
        with self._path.open("rb+") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - (1 << 16))
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)

    def _check(self, path: Path, study: Study) -> None:
        told: Mapping[str, Any] = {"fingerprint": study.fingerprint(), "study": study.model_dump(mode="json")}
        if path.exists() and self._path.exists() and self._path.stat().st_size:
            try:
                before = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path} isn't what a study wrote; choose another folder") from None
            if before != told["fingerprint"]:
                raise ConfigError(
                    f"{path.parent} has results of another study, or of this one before it was changed; choose another folder"
                )
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
