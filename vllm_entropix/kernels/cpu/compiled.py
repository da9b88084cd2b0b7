"""How all kernels here are compiled, and whether what comes out is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


@cache
def kept_on_disk() -> bool:
    """Is there a folder that compiled kernels can be kept in: ``NUMBA_CACHE_DIR``, beside the package, or the user's cache?

    A container may have none of them. numba refuses to compile what it can't keep, unless it is told not to.
    """
    try:
        FunctionCache(kept_on_disk.__wrapped__)
    except RuntimeError:
        return False
    return True


def compiled(*, fastmath: Collection[str] = ()) -> Callable[[_Kernel], _Kernel]:
    """Decorates a kernel: machine code that runs without the interpreter's lock.

    What is kept on disk is compiled anew when the kernel's own file has changed. After a change in a file that it calls, remove
    the ``.nbi`` and ``.nbc`` files in the package's ``__pycache__``.

    Args:
        fastmath: LLVM's liberties with floating-point numbers.
    """
    decorate: Callable[[_Kernel], _Kernel] = numba.njit(cache=kept_on_disk(), nogil=True, fastmath=set(fastmath) or False)
    return decorate
