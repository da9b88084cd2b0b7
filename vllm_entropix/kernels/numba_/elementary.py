"""exp(), the largest and the smallest number, written so that LLVM vectorises loops over them.

Without Intel's library, numba calls the C library's ``expf`` for each number; and a maximum of floating-point numbers it takes
one by one, because of NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled

# Below this, exp() would not be a normal number: 1e-38 is given instead, which is nothing beside exp(0).
LOWEST = np.float32(-87.0)
_LOG2E = np.float32(math.log2(math.e))
# ln 2 in two parts. The first has so few digits that its products with small whole numbers are exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2.0) - 0.693359375)
# Added to a float32 below 2²², it leaves the nearest whole number in the last bits of the sum.
_ROUNDER = np.float32(1.5 * 2**23)
# exp(r) ≈ 1 + r + r² p(r) where |r| ≤ ln 2 / 2: the polynomial of Cephes' expf.
_P0, _P1, _P2, _P3, _P4, _P5 = (
    np.float32(p)
    for p in (5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
)
_ABOVE_SIGN = np.int32(0x7FFFFFFF)
_SMALLEST, _LARGEST = np.int32(-(2**31)), np.int32(2**31 - 1)


# No reassociation here: adding and subtracting the rounder would cancel.
@compiled(fastmath={"contract"})
def exponential(x: Any) -> Any:
    """``exp(x)`` of a float32 up to 0, within two units in the last place; below -87 that of -87; NaN of NaN."""
    x = LOWEST if x < LOWEST else x
    shifted = np.float32(x * _LOG2E + _ROUNDER)
    whole = shifted - _ROUNDER
    r = x - whole * _LN2_HIGH - whole * _LN2_LOW
    p = _P0 + r * (_P1 + r * (_P2 + r * (_P3 + r * (_P4 + r * _P5))))
    power = np.int32((shifted.view(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (np.float32(1.0) + (r + r * r * p)) * power


@compiled()
def _ordered(bits: Any) -> Any:
    """A float32's bits as an int32 that is the larger, the larger the number is; the same again gives the bits."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & _ABOVE_SIGN))


@compiled()
def largest(numbers: Any) -> Any:
    """The largest of float32 ``[n]``, at least one; if some are NaN, NaN or the largest of the others."""
    found = _SMALLEST
    for i in range(numbers.shape[0]):
        found = max(found, _ordered(np.float32(numbers[i]).view(np.int32)))
    return np.int32(_ordered(found)).view(np.float32)


@compiled()
def extremes(numbers: Any) -> Any:
    """The smallest and the largest of float32 ``[n]``, at least one, without NaN."""
    low, high = _LARGEST, _SMALLEST
    for i in range(numbers.shape[0]):
        ordered = _ordered(np.float32(numbers[i]).view(np.int32))
        low, high = min(low, ordered), max(high, ordered)
    return np.int32(_ordered(low)).view(np.float32), np.int32(_ordered(high)).view(np.float32)


@compiled()
def rounded_up(number: float) -> Any:
    """The smallest float32 that is no smaller."""
    near = np.float32(number)
    return np.nextafter(near, np.float32(np.inf)) if near < number else near
