"""Sharing rows among threads. The kernels release the interpreter's lock, so ordinary threads do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

# Waking a thread takes about as long as this many multiplications.
WORTH_SHARING = 1 << 19


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="entropix")


def share_rows(costs: np.ndarray, work: Callable[[int, int], None]) -> None:
    """Call ``work(first_row, last_row)`` for all rows, in as many threads as PyTorch uses if that is worth it.

    Args:
        costs: ``[rows]``, roughly the multiplications that each row takes.
        work: does rows ``first_row`` to ``last_row - 1``; a row's result mustn't depend on how they are shared.
    """
    rows, workers = len(costs), torch.get_num_threads()
    total = int(costs.sum())
    if rows < 2 or workers < 2 or total < WORTH_SHARING:
        work(0, rows)
        return
    borders = np.searchsorted(costs.cumsum(), np.linspace(0, total, workers + 1)[1:-1], side="right").tolist()
    pairs = list(zip([0, *borders], [*borders, rows], strict=True))
    # The last share is done here rather than waited for.
    waiting = [_pool(workers).submit(work, first, last) for first, last in pairs[:-1] if last > first]
    work(*pairs[-1])
    for future in waiting:
        future.result()
