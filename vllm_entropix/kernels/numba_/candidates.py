"""A row's candidates: at the front of its own logits, by ascending token id, with their ids beside them.

As long as none has been dropped each stands in its token's place, and no ids are written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.elementary import largest

# Logits that are passed over together where none of them is looked for.
STRETCH = 64


@compiled()
def drop(line: Any, ids: Any, count: int, least: Any, most: Any) -> int:
    """Keep candidates with logits from ``least`` to ``most``; how many are left."""
    kept, whole = 0, count == line.shape[0]
    for start in range(0, count, STRETCH):
        stop = min(start + STRETCH, count)
        if largest(line[start:stop]) < least:
            continue
        # What isn't kept is written over, which is cheaper than a branch that is guessed wrong.
        for i in range(start, stop):
            value = line[i]
            line[kept], ids[kept] = value, i if whole else ids[i]
            kept += (value >= least) & (value <= most)
    return kept


@compiled()
def keep_alone(line: Any, ids: Any, count: int, index: int) -> int:
    """Keep one candidate; how many are left."""
    line[0], ids[0] = line[index], token_of(line, ids, count, index)
    return 1


@compiled()
def token_of(line: Any, ids: Any, count: int, index: int) -> int:
    """A candidate's token."""
    return index if count == line.shape[0] else ids[index]


@compiled()
def index_of(line: Any, ids: Any, count: int, token: int) -> int:
    """Index of a token's candidate; -1 if it is none."""
    index: Any = token if count == line.shape[0] else np.searchsorted(ids[:count], token)
    return index if 0 <= index < count and token_of(line, ids, count, index) == token else -1


@compiled()
def first_of(line: Any, count: int, value: Any) -> int:
    """Index of the first candidate with this logit, which one has."""
    for start in range(0, count, STRETCH):
        stop = min(start + STRETCH, count)
        if largest(line[start:stop]) >= value:
            for i in range(start, stop):
                if line[i] == value:
                    return i
    return 0


@compiled()
def at_least(line: Any, count: int, least: Any, found: Any) -> int:
    """Fill ``found`` with the indices of the candidates with logits of ``least`` or more; how many there are."""
    size = 0
    for start in range(0, count, STRETCH):
        stop = min(start + STRETCH, count)
        if largest(line[start:stop]) >= least:
            for i in range(start, stop):
                found[size] = i
                size += line[i] >= least
    return size


@compiled()
def largest_up_to(line: Any, most: Any) -> Any:
    """The largest of logits, of those up to ``most``."""
    found = np.float32(-np.inf)
    for start in range(0, line.shape[0], STRETCH):
        part = line[start : start + STRETCH]
        if largest(part) > found:
            for value in part:
                if found < value <= most:
                    found = value
    return found


@compiled()
def put_back(line: Any, ids: Any, count: int, dropped: Any) -> None:
    """Move what stands at the front of a row to its tokens' places; elsewhere stands ``dropped``."""
    if count == line.shape[0]:
        return
    values = line[:count].copy()
    line[:] = dropped
    for i in range(count):
        line[ids[i]] = values[i]
