"""The one way from a record's numbers to JSON: values and bytes, straight from the array.

JSON has no NaN and no infinity. They become null here (see :class:`.fields.Field`), so a response, a stream's chunk and a line
on disk say the same of a token, and any reader of JSON takes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pydantic_core import to_json

from vllm_entropix.records.fields import Field, all_fields, names

# Tokens that are encoded without letting other threads run: about a millisecond.
PART = 128
# Integers up to here are exact in a float32.
_EXACT = 2**24


def record_values(values: np.ndarray) -> list[dict[str, Any]]:
    """Records as JSON values: the table's fields in order, then ``alternatives``, a list of (id, probability).

    Args:
        values: float32 ``[tokens, fields]``: the packed numbers, then ids and probabilities of alternatives.
    """
    keys = (*names(), "alternatives")
    return [dict(zip(keys, row, strict=True)) for row in zip(*_columns(values), strict=True)]


def entry_values(token_ids: Sequence[int], values: np.ndarray) -> list[dict[str, Any]]:
    """The same with ``token_id`` in front: what :class:`~.schema.TokenEntry` describes.

    Args:
        token_ids: of the records.
        values: see :func:`record_values`.
    """
    keys = ("token_id", *names(), "alternatives")
    return [dict(zip(keys, row, strict=True)) for row in zip(token_ids, *_columns(values), strict=True)]


def entries_json(token_ids: Sequence[int], values: np.ndarray) -> Iterator[bytes]:
    """The entries as JSON with commas between them and without brackets, PART tokens at a time.

    Args:
        token_ids: of the records.
        values: see :func:`record_values`.
    """
    for start in range(0, len(values), PART):
        part = to_json(entry_values(token_ids[start : start + PART], values[start : start + PART]))[1:-1]
        yield b"," + part if start else part
        time.sleep(0)


def _columns(values: np.ndarray) -> list[list[Any]]:
    fields = all_fields()
    columns = [_column(values[:, index], field) for index, field in enumerate(fields)]
    return [*columns, _alternatives(values[:, len(fields) :])]


def _column(values: np.ndarray, field: Field) -> list[Any]:
    if field.dtype == "bool":
        return _or_none(values > 0, np.isfinite(values)) if field.nullable else list((values > 0).tolist())
    if field.dtype == "category":
        known = (values >= 0) & (values < len(field.categories))
        indices = np.where(known, values, 0).astype(np.int64)
        return _or_none(np.array(field.categories, dtype=object)[indices], known)
    if field.dtype == "int":
        known = (values >= 0) & (values <= _EXACT)
        return _or_none(np.where(known, values, 0).astype(np.int64), known)
    return _floats(values)


def _floats(values: np.ndarray) -> list[Any]:
    return _or_none(values, np.isfinite(values))


def _or_none(values: np.ndarray, known: np.ndarray) -> list[Any]:
    """The values, None where they aren't known."""
    found: list[Any]
    if known.all():
        found = values.tolist()
    else:
        objects = values.astype(object)
        objects[~known] = None
        found = objects.tolist()
    return found


def _alternatives(extra: np.ndarray) -> list[Any]:
    half = extra.shape[1] // 2
    token_ids, probabilities = extra[:, :half], extra[:, half : 2 * half]
    pairs = zip(token_ids.astype(np.int64).tolist(), _floats(probabilities), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]
