"""The file of a recording, and what differs between two."""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Answers = dict[str, dict[str, Any]]


class RecordingError(Exception):
    """A file that can't be used; the message is for the user."""


@dataclass
class Recording:
    """What was answered.

    Attributes:
        about: the code, the requests and the machine that it was recorded with.
        parts: each finished part's answers, by the requests' names.
    """

    about: dict[str, Any]
    parts: dict[str, Answers] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Recording:
        """The recording in a file; RecordingError if there is none."""
        try:
            found = json.loads(gzip.decompress(path.read_bytes()))
            return cls(found["about"], found["parts"])
        except (gzip.BadGzipFile, zlib.error, EOFError, ValueError, KeyError, TypeError):
            raise RecordingError(f"{path} is no recording") from None
        except OSError as error:
            raise RecordingError(f"can't read {path}: {error.strerror or error}") from None

    def write(self, path: Path) -> None:
        """Write it in whole or not at all."""
        text = json.dumps({"about": self.about, "parts": self.parts}, separators=(",", ":"))
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_bytes(gzip.compress(text.encode(), mtime=0))
        os.replace(unfinished, path)


@dataclass(frozen=True)
class Summary:
    """What a part's answers amount to.

    Attributes:
        digest: SHA-256 of the answers, its first twelve digits.
        regimes: records of each regime.
    """

    requests: int
    tokens: int
    records: int
    forced: int
    regimes: dict[str, int]
    digest: str

    @classmethod
    def of(cls, answers: Answers) -> Summary:
        """The summary of a part."""
        completions = [completion for answer in answers.values() for completion in answer["completions"]]
        records = [record for completion in completions for record in completion["trace"] or ()]
        canonical = json.dumps(answers, sort_keys=True, separators=(",", ":")).encode()
        return cls(
            requests=len(answers),
            tokens=sum(len(completion["token_ids"]) for completion in completions),
            records=len(records),
            forced=sum(record["forced"] for record in records),
            regimes=dict(sorted(collections.Counter(record["regime"] for record in records).items())),
            digest=hashlib.sha256(canonical).hexdigest()[:12],
        )


@dataclass
class Comparison:
    """What two recordings differ in.

    Attributes:
        different: request → where its answers first differ, the value before, and the one after.
        further: names of fields that only the second has, which is no difference: a record may gain a field.
    """

    different: dict[str, tuple[str, Any, Any]] = field(default_factory=dict)
    further: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, before: Recording, after: Recording) -> Comparison:
        """Compare all requests of the first recording."""
        found = cls()
        for part, answers in before.parts.items():
            others = after.parts.get(part, {})
            for request, answer in answers.items():
                name = f"{part}: {request}"
                if request not in others:
                    found.different[name] = ("", "an answer", "none")
                    continue
                first = next(found._differences(answer, others[request]), None)
                if first is not None:
                    found.different[name] = first
        return found

    def _differences(self, before: Any, after: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
        if isinstance(before, dict) and isinstance(after, dict):
            self.further |= after.keys() - before.keys()
            for key, value in before.items():
                yield from self._differences(value, after.get(key, "absent"), f"{place}.{key}".lstrip("."))
        elif isinstance(before, list) and isinstance(after, list):
            for index, (one, other) in enumerate(zip(before, after, strict=False)):
                yield from self._differences(one, other, f"{place}[{index}]")
            if len(before) != len(after):
                yield place, f"{len(before)} entries", f"{len(after)} entries"
        elif type(before) is not type(after) or before != after:
            yield place, before, after
