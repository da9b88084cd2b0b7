"""Reads which answers are right: a CSV file with a row per answer, made by a checker or by hand."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_entropix.settings.errors import ConfigError, quoted

_RIGHT = frozenset({"1", "1.0", "true", "yes", "right", "correct"})
_WRONG = frozenset({"0", "0.0", "false", "no", "wrong", "incorrect"})
# Columns: which answer, is it right, which question does it answer.
ANSWER, INDEX, CORRECT, ITEM = "request_id", "index", "correct", "item"


@dataclass(frozen=True, slots=True)
class Label:
    """What is known of an answer.

    Attributes:
        wrong: it isn't right.
        item: the question that it answers; None: the file doesn't tell.
        group: value of the column that figures are told apart by; None: there is none.
    """

    wrong: bool
    item: str | None = None
    group: str | None = None


def read_labels(path: str | Path, by: str | None = None) -> dict[tuple[str, int], Label]:
    """(request id, index) → label. A row whose ``correct`` is empty labels nothing.

    Args:
        path: of a CSV file with the columns request_id and correct, and index and item if it likes; others don't matter.
        by: name of another column, whose values tell figures apart.

    Raises:
        ConfigError: the file can't be read, lacks a column, or has a row that can't be understood; names the line.
    """
    found: dict[tuple[str, int], Label] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or ()
            for column in (ANSWER, CORRECT, *([by] if by is not None else [])):
                if column not in columns:
                    raise ConfigError(
                        f"{path} has no column {quoted(column)}; its first line names {quoted(', '.join(columns))}"
                    )
            for row in rows:
                place = f"{path}, line {rows.line_num}"
                if not (row[CORRECT] or "").strip():
                    continue
                key = _answer(row, place)
                if key in found:
                    raise ConfigError(f"{place}: {quoted(key[0])} index {key[1]} is labelled twice; leave one of them out")
                found[key] = Label(_is_wrong(row[CORRECT], place), row.get(ITEM) or None, None if by is None else row[by])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise ConfigError(f"{path} labels no answer; give its column {CORRECT!r} 1 for right ones and 0 for wrong ones")
    return found


def _answer(row: Mapping[str, str | None], place: str) -> tuple[str, int]:
    name, index = row[ANSWER], (row.get(INDEX) or "0").strip()
    if not name:
        raise ConfigError(f"{place}: {ANSWER} is empty")
    if not (index.isascii() and index.isdigit() and len(index) < 10):
        raise ConfigError(f"{place}: {INDEX} is {quoted(index)}, but it should be the number of an answer")
    return name, int(index)


def _is_wrong(value: str | None, place: str) -> bool:
    word = (value or "").strip().lower()
    if word not in _RIGHT | _WRONG:
        raise ConfigError(f"{place}: {CORRECT} is {quoted(value)}, but it should be 1 or 0")
    return word in _WRONG
