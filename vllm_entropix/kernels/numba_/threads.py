"""Sharing rows among threads. The kernels release the interpreter's lock, so ordinary threads do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

# Nanoseconds that sharing has to save at best. Waking a thread takes tenths of a millisecond, and for some more it may have to
# wait for a core: two threads on two cores took longer than one for everything that one did in less than 4 ms, and what they
# saved of 4 to 9 ms was little and not reliable.
WORTH_SHARING = 4_000_000
# Shares for each thread. PyTorch's own threads spin for a while after their work, so that one of ours may get half a core:
# whoever is done takes the next share.
_SHARES = 4


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="entropix")


def share_equal_rows(rows: int, cost: int, work: Callable[[int, int], None]) -> None:
    """As :func:`share_rows`, of rows that take ``cost`` nanoseconds each."""
    if rows < 2 or rows * cost < WORTH_SHARING:  # whatever the number of threads
        work(0, rows)
    else:
        share_rows(np.full(rows, cost), work)


def share_rows(costs: np.ndarray, work: Callable[[int, int], None]) -> None:
    """Call ``work(first_row, last_row)`` for all rows, in as many threads as PyTorch uses if that is worth it.

    Args:
        costs: integers ``[rows]``, roughly the nanoseconds that each row takes.
        work: does rows ``first_row`` to ``last_row - 1``; a row's result mustn't depend on how they are shared.
    """
    rows, workers = len(costs), torch.get_num_threads()
    total = int(costs.sum())
    if rows < 2 or workers < 2 or total - total // workers < WORTH_SHARING:
        work(0, rows)
        return
    shares = np.linspace(0, total, min(rows, _SHARES * workers) + 1)[1:-1]
    borders = np.searchsorted(costs.cumsum(), shares, side="right").tolist()
    pairs = zip([0, *borders], [*borders, rows], strict=True)
    waiting = deque((first, last) for first, last in pairs if last > first)

    def take() -> None:
        while True:
            try:
                first, last = waiting.popleft()
            except IndexError:
                return
            work(first, last)

    helpers = [_pool(workers).submit(take) for _ in range(min(workers, len(waiting)) - 1)]
    take()
    for helper in helpers:
        # One that hasn't begun isn't waited for: all is done.
        if not helper.cancel():
            helper.result()
