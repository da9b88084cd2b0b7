"""Traces as tables, one row per token or one per answer, for pandas, Parquet and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.records.fields import all_fields, names
from vllm_entropix.records.line import TraceLine
from vllm_entropix.records.schema import TokenEntry
from vllm_entropix.records.scores import SCORES, AnswerScores, scores_of_entries
from vllm_entropix.records.trace import traces
from vllm_entropix.settings.errors import ConfigError

if TYPE_CHECKING:
    import pandas

# Columns of a table, in order: of the sequence, of the token; then the fields of a record, then its alternatives.
_OF_SAMPLER = ("preset", "fidelity")
SEQUENCE_COLUMNS = ("request_id", "index", "model", "sampler", *_OF_SAMPLER, "prompt_hash", "prompt_tokens")
TOKEN_COLUMNS = ("position", "token_id", "text")
_ALTERNATIVES = ("alternative_ids", "alternative_probabilities")
# What is repeated over and over is stored once.
_CATEGORIES = ("request_id", "model", "sampler", *_OF_SAMPLER, "prompt_hash")
# Columns that hold what clients and models wrote, and how a cell begins that spreadsheets compute (also in full width).
_TEXTS = (*_CATEGORIES, "text")
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# A column's type in pandas, by what the field is and whether it can be null. Categories are made of the whole table.
_DTYPES = {"float": "float32", "int": "Int32", "bool": "boolean", "category": "object"}
# Sequences that are held as Python objects at a time.
_CHUNK = 64


def columns() -> tuple[str, ...]:
    """The columns of a table, in order."""
    return (*SEQUENCE_COLUMNS, *TOKEN_COLUMNS, *names(), *_ALTERNATIVES)


def to_pandas(source: str | Path | TraceLine | Iterable[Any]) -> pandas.DataFrame:
    """A DataFrame with a row per traced token (columns: ``columns``).

    Metrics that weren't measured are NaN. Of vLLM's outputs, which know neither model nor settings nor the tokens' texts, those
    columns are empty; outputs without a trace give no rows.

    Args:
        source: a file of traces, lines of one, or RequestOutputs of ``LLM.generate``.

    Raises:
        ConfigError: pandas isn't installed.
        TraceFileError: see ``read_traces``.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError(f"to_pandas needs pandas ({error}); install vllm-entropix[report]") from None
    frames = []
    gathered: dict[str, list[Any]] = {name: [] for name in columns()}
    for number, rows in enumerate(_sequences(source), 1):
        for row in rows:
            for name, values in gathered.items():
                values.append(row[name])
        if number % _CHUNK == 0:
            frames.append(_frame(pd, gathered))
            gathered = {name: [] for name in columns()}
    frames.append(_frame(pd, gathered))
    table = pd.concat(frames, ignore_index=True)
    categories = {field.name: list(field.categories) for field in all_fields() if field.categories}
    for name in (*_CATEGORIES, *categories):
        table[name] = pd.Categorical(table[name], categories=categories.get(name))
    return table


def answers_to_pandas(source: str | Path | TraceLine | Iterable[Any]) -> pandas.DataFrame:
    """A DataFrame with a row per traced answer: which it is, its scores, its text and tokens' number (``answer_columns``).

    Args:
        source: see ``to_pandas``.

    Raises:
        ConfigError: pandas isn't installed.
        TraceFileError: see ``read_traces``.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError(f"answers_to_pandas needs pandas ({error}); install vllm-entropix[report]") from None
    rows = [{**answer.known, **answer.scores(), "text": answer.text} for answer in _answers(source)]
    table = pd.DataFrame(rows, columns=list(answer_columns()))
    for score in SCORES:
        table[score.name] = table[score.name].astype("float64")
    return table


def answer_columns() -> tuple[str, ...]:
    """The columns of a table of answers, in order."""
    return (*SEQUENCE_COLUMNS, "finish_reason", "tokens", *(score.name for score in SCORES), "text")


def to_parquet(source: str | Path | TraceLine | Iterable[Any], path: str | Path, answers: bool = False) -> int:
    """Write the table of ``to_pandas`` as Parquet; returns the number of rows, errors as there and for pyarrow.

    Args:
        source: see ``to_pandas``.
        path: of the table.
        answers: write the table of ``answers_to_pandas`` instead.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Parquet needs pyarrow ({error}); install vllm-entropix[report]") from None
    return _write(source, path, "to_parquet", answers)


def to_csv(source: str | Path | TraceLine | Iterable[Any], path: str | Path, answers: bool = False) -> int:
    """Write the table of ``to_pandas`` as CSV; returns the number of rows, errors as there.

    A text that a spreadsheet would take for a formula gets an apostrophe in front, which makes it text there.

    Args:
        source: see ``to_pandas``.
        path: of the table.
        answers: write the table of ``answers_to_pandas`` instead.
    """
    return _write(source, path, "to_csv", answers)


def _as_text(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULAS) else cell


def _write(source: Any, path: str | Path, method: str, answers: bool) -> int:
    table, options = (answers_to_pandas if answers else to_pandas)(source), {}
    if method == "to_csv":
        for name in _TEXTS:
            table[name] = table[name].astype(object).map(_as_text)
        # A carriage return that isn't in quotes begins a row, whose first cell would again be a formula.
        options["quoting"] = csv.QUOTE_NONNUMERIC
    try:
        getattr(table, method)(path, index=False, **options)
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror or error}") from None
    return len(table)


def _frame(pd: Any, gathered: dict[str, list[Any]]) -> pandas.DataFrame:
    frame = pd.DataFrame(gathered)
    for field in all_fields():
        frame[field.name] = frame[field.name].astype(_DTYPES[field.dtype] if field.nullable else field.dtype)
    return frame


@dataclass(frozen=True)
class _Answer:
    """A sequence, whatever it came from.

    Attributes:
        known: of it as a whole, by column.
        token_ids: generated tokens.
        texts: of each token; None: not known.
        entries: of the tokens that have a record.
        told: its scores; None: they are those of the entries.
    """

    known: dict[str, Any]
    token_ids: list[int]
    texts: list[str] | list[None]
    entries: list[TokenEntry]
    told: AnswerScores | None

    @property
    def text(self) -> str | None:
        """What was answered; None: not known."""
        return None if None in self.texts else "".join(map(str, self.texts))

    def scores(self) -> dict[str, Any]:
        """The scores by name, and the number of tokens that they sum up."""
        return (self.told or scores_of_entries(self.entries)).model_dump(exclude={"abstained"})


def _sequences(source: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows of each sequence."""
    for answer in _answers(source):
        yield _rows({name: answer.known[name] for name in SEQUENCE_COLUMNS}, answer.token_ids, answer.texts, answer.entries)


def _answers(source: Any) -> Iterator[_Answer]:
    if isinstance(source, (str, Path)):
        source = read_traces(source)
    elif isinstance(source, TraceLine):
        source = (source,)
    for item in source:
        if isinstance(item, TraceLine):
            told = {"sampler": item.drawn_by, **{name: item.of_sampler(name, str) for name in _OF_SAMPLER}}
            known = {name: told[name] if name in told else getattr(item, name) for name in SEQUENCE_COLUMNS}
            known["finish_reason"] = item.finish_reason
            yield _Answer(known, item.token_ids, item.texts, item.records, item.scores)
            continue
        for completion, trace in zip(item.outputs, traces(item), strict=True):
            if trace is not None:
                known = dict.fromkeys(SEQUENCE_COLUMNS) | {
                    "request_id": item.request_id,
                    "index": completion.index,
                    "prompt_tokens": len(item.prompt_token_ids or ()),
                    "finish_reason": completion.finish_reason,
                }
                ids = list(completion.token_ids)
                entries = [TokenEntry.from_record(token, record) for token, record in zip(ids, trace, strict=False)]
                yield _Answer(known, ids, [None] * len(ids), entries, getattr(completion, "entropix_scores", None))


def _rows(
    known: dict[str, Any], ids: list[int], texts: list[str] | list[None], entries: Iterable[TokenEntry]
) -> Iterator[dict[str, Any]]:
    for position, (token, text, entry) in enumerate(zip(ids, texts, entries, strict=False)):
        yield {
            **known,
            "position": position,
            "token_id": token,
            "text": text,
            **{name: getattr(entry, name) for name in names()},
            "alternative_ids": [alternative for alternative, _ in entry.alternatives],
            "alternative_probabilities": [p for _, p in entry.alternatives],
        }
