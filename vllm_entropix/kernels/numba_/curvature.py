"""Candidates before the tail of their sorted probabilities, which is where these stop bending."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.weights import BLOCK, total_of

# Bits of a float32 that are sorted by at a time, and how often.
_BITS, _PASSES = 11, 3
# A curvature that is no larger counts the same between all candidates.
_LEAST = 1e-6
# Logits that are no further apart have a short series for their weights' ratio.
_NEAR = 0.004


@compiled()
def band_of_curvature(line: Any, count: int, high: Any, share: float, slack: float, room: Any, spare: Any) -> Any:
    """Find the candidates before which the curvature of the sorted probabilities is at most a share of all; one at least.

    The curvature is the sum of their absolute second differences. Equals come by their ids.

    Args:
        line: float32, the candidates' logits at its front, three or more, none of them -inf; those that are equal to the last
            that stays, but come behind it, become -inf.
        count: how many there are.
        high: the largest logit.
        share: of the curvature.
        slack: what is above the border by so little isn't.
        room: float32 and float64 ``[count]`` or more, to work in.
        spare: int32 ``[count]`` or more, too.

    Returns:
        The least logit that stays, the weight of all that stay, and is any logit -inf now?
    """
    values, weights = room[0][:count], room[1][:count]
    _put_in_order(line[:count], values, spare[:count].view(np.uint32))
    _weigh_in_order(values, np.float64(high), weights)
    total, curvature = total_of(weights), _curvature(weights)
    if curvature <= _LEAST * total:
        number = min(int((share + slack) * (count - 2)), count - 2)
    else:
        number = _number_within(weights, (share + slack) * curvature)
    if number == count - 2:
        return values[count - 1], total, False
    number = max(number, 1)
    least, weight = values[number - 1], total_of(weights[:number])
    if values[number] < least:
        return least, weight, False
    equals = 0
    while equals < number and values[number - 1 - equals] == least:
        equals += 1
    for i in range(count):
        if line[i] == least:
            equals -= 1
            if equals < 0:
                line[i] = -np.inf
    return least, weight, True


@compiled()
def _weigh_in_order(values: Any, high: float, weights: Any) -> None:
    """Fill ``weights`` with exp(l - high) of descending logits: float32 is too coarse for differences of differences."""
    before, weight = high, 1.0
    for i in range(len(values)):
        fall = before - np.float64(values[i])
        # Neighbours are near one another, and so few terms exact to 1e-14.
        weight *= np.exp(-fall) if fall > _NEAR else 1 - fall * (1 - fall * (1 / 2 - fall * (1 / 6 - fall * (1 / 24))))
        weights[i], before = weight, np.float64(values[i])


# The order of the sums is LLVM's, so that it may add several side by side.
@compiled(fastmath={"reassoc", "nsz"})
def _curvature(weights: Any) -> float:
    """Sum of the absolute second differences."""
    found = 0.0
    for i in range(len(weights) - 2):
        found += _bend(weights, i)
    return found


@compiled()
def _number_within(weights: Any, limit: float) -> int:
    """How many second differences have a sum of at most ``limit``."""
    number, reached = 0, 0.0
    while number + BLOCK < len(weights) - 2:
        further = reached + _curvature(weights[number : number + BLOCK + 2])
        if further > limit:
            break
        number, reached = number + BLOCK, further
    while number < len(weights) - 2:
        reached += _bend(weights, number)
        if reached > limit:
            break
        number += 1
    return number


@compiled()
def _bend(weights: Any, i: int) -> float:
    """How far the second of three weights is from the middle of the others, twice."""
    return float(abs((weights[i] - weights[i + 1]) - (weights[i + 1] - weights[i + 2])))


@compiled()
def _put_in_order(numbers: Any, found: Any, others: Any) -> None:
    """Fill ``found`` with float32 ``[n]``, the largest first; none of them is NaN. ``others`` is room, uint32 ``[n]``."""
    size, mask = 1 << _BITS, np.uint32((1 << _BITS) - 1)
    tallies = np.zeros((_PASSES, size), dtype=np.int64)
    keys, bits = found.view(np.uint32), numbers.view(np.uint32)
    for i in range(len(numbers)):
        # As unsigned numbers these ascend where floats descend.
        key = bits[i] if bits[i] >> np.uint32(31) else np.uint32(bits[i] ^ np.uint32(0x7FFFFFFF))
        others[i] = key
        for turn in range(_PASSES):
            tallies[turn, (key >> np.uint32(turn * _BITS)) & mask] += 1
    for turn in range(_PASSES):
        place = 0
        for digit in range(size):
            place, tallies[turn, digit] = place + tallies[turn, digit], place
        for i in range(len(numbers)):
            digit = (others[i] >> np.uint32(turn * _BITS)) & mask
            keys[tallies[turn, digit]] = others[i]
            tallies[turn, digit] += 1
        keys, others = others, keys
    # After an odd number of turns they stand where they belong.
    for i in range(len(numbers)):
        key = others[i]
        others[i] = key if key >> np.uint32(31) else np.uint32(key ^ np.uint32(0x7FFFFFFF))
