"""How all kernels here are compiled."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numba

from vllm_entropix.kernels.numba_.machine_code import MachineCode, kept_on_disk

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def compiled(*, fastmath: Collection[str] = ()) -> Callable[[_Kernel], _Kernel]:
    """Decorates a kernel: machine code that runs without the interpreter's lock, and is kept on disk if there is a folder.

    Args:
        fastmath: LLVM's liberties with floating-point numbers.
    """

    def decorate(kernel: _Kernel) -> _Kernel:
        dispatcher = numba.njit(nogil=True, fastmath=set(fastmath) or False)(kernel)
        if kept_on_disk():
            dispatcher._cache = MachineCode(kernel)
        return dispatcher  # type: ignore[no-any-return]

    return decorate
