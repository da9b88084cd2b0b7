"""Sizes of launches, computed on the host.

triton's own ``cdiv`` and ``next_power_of_2`` unwrap their arguments, as kernels need it: microseconds a call, often in a step.
"""

from __future__ import annotations


def parts(whole: int, size: int) -> int:
    """How many parts of at most this size a whole has."""
    return -(-whole // size)


def power_of_2(number: int) -> int:
    """The smallest power of two that isn't below a number of at least 1."""
    return 1 << (number - 1).bit_length()
