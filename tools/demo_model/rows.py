"""Turns documents into rows of tokens for training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from vocab import BOS, token_id
from writer import Doc

#: Label of a token that gives no training signal.
IGNORED = -100

#: Documents are packed (and shuffled) in groups of this size.
POOL = 4096


@dataclass
class Encoded:
    """The tokens of one document, and for each of them the label (itself, or ``IGNORED``)."""

    doc: Doc
    tokens: list[int]
    labels: list[int]
    #: Character offset at which each token begins (-1 for the token in front of the text).
    starts: list[int]


def encode(tokenizer: Tokenizer, docs: Iterable[Doc]) -> Iterator[Encoded]:
    """Encode documents, each with the token for the beginning of text in front."""
    bos = token_id(tokenizer, BOS)
    stream = iter(docs)
    while group := list(islice(stream, POOL)):
        for doc, encoding in zip(
            group, tokenizer.encode_batch([doc.text for doc in group], add_special_tokens=False), strict=True
        ):
            starts = [start for start, _ in encoding.offsets]
            labels = [
                IGNORED if any(first <= start < last for first, last in doc.mute) else token
                for start, token in zip(starts, encoding.ids, strict=True)
            ]
            yield Encoded(doc, [bos, *encoding.ids], [IGNORED, *labels], [-1, *starts])


@dataclass
class Rows:
    """Rows of equal length; ``owner`` tells the documents of a row apart (0 is padding)."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    owner: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)


def _table(rows: list[list[Encoded]], length: int, pad: int) -> Rows:
    tokens = np.full((len(rows), length), pad, np.int64)
    labels = np.full((len(rows), length), IGNORED, np.int64)
    owner = np.zeros((len(rows), length), np.int64)
    for at, row in enumerate(rows):
        end = 0
        for number, item in enumerate(row, start=1):
            size = min(len(item.tokens), length - end)
            tokens[at, end : end + size] = item.tokens[:size]
            labels[at, end : end + size] = item.labels[:size]
            owner[at, end : end + size] = number
            end += size
    return Rows(tokens, labels, owner)


def pack_short(items: list[Encoded], length: int, pad: int) -> Rows:
    """Pack whole documents into rows (first fit, longest first); no document is cut."""
    rows: list[list[Encoded]] = []
    free: list[int] = []
    first_open = 0
    for item in sorted(items, key=lambda item: -len(item.tokens)):
        size = len(item.tokens)
        for at in range(first_open, len(rows)):
            if free[at] >= size:
                break
        else:
            at = len(rows)
            rows.append([])
            free.append(length)
        rows[at].append(item)
        free[at] -= size
        while first_open < len(rows) and free[first_open] < 24:
            first_open += 1
    return _table(rows, length, pad)


def pack_long(items: list[Encoded], length: int, pad: int) -> Rows:
    """String documents together; the last one of a row is cut."""
    rows: list[list[Encoded]] = [[]]
    filled = 0
    for item in items:
        rows[-1].append(item)
        filled += len(item.tokens)
        if filled >= length:
            rows.append([])
            filled = 0
    return _table(rows[:-1], length, pad)
