"""How much of a row's end stands before each of its tokens already: ``distribution.history.repetitions``, in one pass."""

from __future__ import annotations

from typing import Any

from vllm_entropix.kernels.numba_.compiled import compiled


@compiled()
def repetitions_of_rows(tokens: Any, enough: Any, found: Any, first_row: int, last_row: int) -> None:
    """Fill ``found`` int64 ``[rows, length - 1]`` of rows ``first_row`` to ``last_row - 1``.

    It is Gusfield's Z algorithm on the row from its end: what is known of the stretch that reaches furthest is used again, so a
    token is compared a constant number of times.

    Args:
        tokens: int64 ``[rows, length]``, aligned to the right; -1 stands before the first.
        enough: int64 ``[rows, 1]``; lengths are counted up to it.
        found: is written.
        first_row: see above.
        last_row: see above.
    """
    last = tokens.shape[1] - 1
    for row in range(first_row, last_row):
        line, lengths = tokens[row], found[row]
        # A stretch, given by how far it begins and ends before the row's end, that equals the row's end.
        begin = end = 0
        for back in range(1, last + 1):
            length = 0
            if back < end:
                length = min(end - back, lengths[last - (back - begin)])
            if back + length >= end:
                while back + length <= last and line[last - back - length] == line[last - length] and line[last - length] >= 0:
                    length += 1
                begin, end = back, back + length
            lengths[last - back] = length
        for place in range(last):
            lengths[place] = min(lengths[place], enough[row, 0])
