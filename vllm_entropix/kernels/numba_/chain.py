"""A chain's filters and temperatures, row by row: what ``samplers.chain.outcome`` does, without putting a vocabulary in order.

A row's candidates are kept at the front of its own logits, by ascending token id, with their ids beside them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.chains import NUMBERS, STAGES
from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.distribute import largest_beside_nan, largest_tokens
from vllm_entropix.kernels.numba_.elementary import exponential, largest, smallest
from vllm_entropix.kernels.numba_.repetitions import repetitions_of_rows
from vllm_entropix.kernels.numba_.weights import BLOCK, total_of, total_weight, weigh

_TEMPERATURE, _DYNATEMP, _TOP_K, _TOP_P, _MIN_P, _TOP_N_SIGMA, _TYP_P, _XTC, _DRY = range(len(STAGES))
_T, _RANGE, _EXPONENT, _K, _P, _MIN, _SIGMAS, _TYPICAL, _PI, _THRESHOLD = range(len(NUMBERS))
# Of sums and ratios, as of float32: see ``distribution.survivors``.
_SLACK = 16 * float(np.finfo(np.float32).eps)
# Temperatures below this are as good as 0.
_COLDEST = 1e-38
# Candidates of a part of the order that are put in order at last.
_FEW = 64
_BINS = 1024


@compiled()
def chain_of_rows(
    logits: Any,
    chosen: Any,
    greedy: Any,
    log_normaliser: Any,
    stages: Any,
    numbers: Any,
    places: Any,
    penalties: Any,
    shares: Any,
    first_row: int,
    last_row: int,
) -> None:
    """Overwrite the chosen rows ``first_row`` to ``last_row - 1`` with the log-probabilities they are drawn from.

    Args:
        logits: float32 ``[rows, vocab]``, changed in place.
        chosen: bool ``[rows]``; other rows are left alone.
        greedy: bool ``[rows]``: the most probable token of what is left, alone.
        log_normaliser: ``[rows]``; not finite where the largest logit isn't, or one is NaN.
        stages: int64, the chain's stages in order, as indices of STAGES.
        numbers: float64 ``[rows, len(NUMBERS)]``.
        places: int64 ``[rows, any]``, tokens that DRY penalises; one may come several times, and the largest penalty counts.
        penalties: float32, of the same shape; 0 where there is none.
        shares: float32 ``[rows]``, written: the share of the distribution in which XTC excluded top choices.
        first_row: where to begin.
        last_row: where to end.
    """
    ids = np.empty(logits.shape[1], dtype=np.int32)
    split = len(stages)
    for index in range(len(stages)):
        if stages[index] == _XTC:
            split = index
    for row in range(first_row, last_row):
        if not chosen[row]:
            continue
        line, own = logits[row], numbers[row]
        shares[row] = 0.0
        if not np.isfinite(log_normaliser[row]):
            best, token = np.empty(1, dtype=np.float32), np.empty(1, dtype=np.int64)
            largest_beside_nan(line, 1, best, token)
            line[:] = -np.inf
            line[token[0]] = 0.0
            continue
        for token_id in range(line.shape[0]):
            ids[token_id] = token_id
        count = _without_dropped(line, ids, line.shape[0])
        count = _through(stages[:split], own, places[row], penalties[row], line, ids, count)
        least, tops, total = -1, 0, 0.0
        if split < len(stages) and own[_PI] > 0 and own[_THRESHOLD] <= 0.5:
            total = total_weight(line, count, largest(line[:count]))
            least, tops = _least_of_top_choices(line, count, own[_THRESHOLD] * (1 - _SLACK) * total)
        if tops < 2:
            count = _through(stages[split + 1 :], own, places[row], penalties[row], line, ids, count)
            _write(line, ids, count, greedy[row])
            continue
        shares[row] = own[_PI]
        if split + 1 == len(stages):
            _write_excluding(line, ids, count, least, tops - 1, total, own[_PI], greedy[row])
            continue
        # The other side of the coin: without the top choices but the least probable of them.
        rest, rest_ids = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.int32)
        left = 0
        for i in range(count):
            if i == least or line[i] < line[least] or (line[i] == line[least] and i > least):
                rest[left], rest_ids[left] = line[i], ids[i]
                left += 1
        count = _through(stages[split + 1 :], own, places[row], penalties[row], line, ids, count)
        left = _through(stages[split + 1 :], own, places[row], penalties[row], rest, rest_ids, left)
        _write_mixture(line, ids, count, rest, rest_ids, left, own[_PI], greedy[row])


def compile_for_steps() -> None:
    """Compile what steps call of chains, or load it from disk: on arrays of their types, and on no rows."""
    rows = np.zeros(1, dtype=np.bool_), np.zeros(1, dtype=np.bool_), np.zeros(1, dtype=np.float32)
    stages, numbers = np.zeros(1, dtype=np.int64), np.zeros((1, len(NUMBERS)))
    places, penalties = np.zeros((1, 0), dtype=np.int64), np.zeros((1, 0), dtype=np.float32)
    shares = np.zeros(1, dtype=np.float32)
    chain_of_rows(np.zeros((1, 1), dtype=np.float32), *rows, stages, numbers, places, penalties, shares, 0, 0)
    tokens = np.zeros((1, 2), dtype=np.int64)
    repetitions_of_rows(tokens, tokens[:, :1].copy(), tokens[:, 1:].copy(), 0, 0)


@compiled()
def _through(stages: Any, own: Any, places: Any, penalties: Any, line: Any, ids: Any, count: int) -> int:
    """Run candidates through stages; how many are left."""
    for stage in stages:
        if stage == _TEMPERATURE:
            count = _scale(line, ids, count, own[_T])
        elif stage == _DYNATEMP:
            count = _scale(line, ids, count, _dynamic(line, count, own))
        elif stage == _TOP_K:
            if 0 < own[_K] < count:
                count = _most_probable(line, ids, count, int(own[_K]))
        elif stage == _TOP_P:
            if own[_P] < 1:
                count = _keep_mass(line, ids, count, False, own[_P] - _SLACK)
        elif stage == _MIN_P:
            if own[_MIN] > 0:
                count = _keep_within(line, ids, count, np.log(own[_MIN] * (1 - _SLACK)))
        elif stage == _TOP_N_SIGMA:
            if own[_SIGMAS] > 0:
                count = _keep_within(line, ids, count, -own[_SIGMAS] * _spread(line, count) * (1 + _SLACK))
        elif stage == _TYP_P:
            if own[_TYPICAL] < 1:
                count = _keep_mass(line, ids, count, True, own[_TYPICAL] + _SLACK)
        elif stage == _DRY:
            count = _penalise(line, ids, count, places, penalties)
    return count


@compiled()
def _without_dropped(line: Any, ids: Any, count: int) -> int:
    """Leave out what is -inf; how many are left. Of most rows nothing is, which vector instructions see."""
    dropped = 0
    for i in range(count):
        dropped += line[i] == -np.inf
    if not dropped:
        return count
    kept = 0
    for i in range(count):
        if line[i] > -np.inf:
            line[kept], ids[kept] = line[i], ids[i]
            kept += 1
    return kept


# The order of the sum is LLVM's, so that it may add several side by side.
@compiled(fastmath={"reassoc", "nsz"})
def _sum_of_products(weights: Any, line: Any, highest: Any) -> float:
    """Sum of the weights times l - highest."""
    total = 0.0
    for i in range(weights.shape[0]):
        total += np.float64(weights[i]) * np.float64(line[i] - highest)
    return total


@compiled()
def _best(line: Any, count: int) -> int:
    """Index of the most probable candidate, of equals that with the lowest id."""
    best = 0
    for i in range(1, count):
        if line[i] > line[best]:
            best = i
    return best


@compiled()
def _spread(line: Any, count: int) -> float:
    """Population standard deviation of the candidates' logits."""
    highest = largest(line[:count])
    mean = 0.0
    for i in range(count):
        mean += np.float64(line[i] - highest)
    mean /= count
    square = 0.0
    for i in range(count):
        square += (np.float64(line[i] - highest) - mean) ** 2
    return float(np.sqrt(square / count))


@compiled()
def _total_and_entropy(line: Any, count: int, highest: Any) -> Any:
    """Sum of the candidates' weights exp(l - highest), and their entropy in nats."""
    weights = np.empty(BLOCK, dtype=np.float32)
    total, found = 0.0, 0.0
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        part = line[start : start + length]
        weigh(part, highest, weights[:length])
        total += total_of(weights[:length])
        found -= _sum_of_products(weights[:length], part, highest)
    return total, float(found / total + np.log(total))


@compiled()
def _dynamic(line: Any, count: int, own: Any) -> float:
    """dynatemp's temperature."""
    if own[_RANGE] <= 0:
        return float(own[_T])
    if count < 2:
        return 1.0
    highest = largest(line[:count])
    share = _total_and_entropy(line, count, highest)[1] / np.log(count)
    low, high = max(own[_T] - own[_RANGE], 0.0), own[_T] + own[_RANGE]
    return float(low + (high - low) * min(max(share, 0.0), 1.0) ** own[_EXPONENT])


@compiled()
def _scale(line: Any, ids: Any, count: int, temperature: float) -> int:
    """Divide the distances from the largest logit; at 0 or less the most probable candidate stays."""
    if temperature <= 0:
        best = _best(line, count)
        line[0], ids[0] = line[best], ids[best]
        return 1
    _multiply(line[:count], largest(line[:count]), np.float32(1 / max(temperature, _COLDEST)))
    return _without_dropped(line, ids, count)


@compiled()
def _multiply(line: Any, highest: Any, factor: Any) -> None:
    """Replace each l by (l - highest) · factor."""
    for i in range(line.shape[0]):
        line[i] = (line[i] - highest) * factor


@compiled()
def _keep_within(line: Any, ids: Any, count: int, distance: float) -> int:
    """Keep candidates whose logit is no further from the largest than this, which is 0 or less."""
    highest = largest(line[:count])
    kept = 0
    for i in range(count):
        if line[i] == highest or line[i] - highest >= distance:
            line[kept], ids[kept] = line[i], ids[i]
            kept += 1
    return kept


@compiled()
def _most_probable(line: Any, ids: Any, count: int, k: int) -> int:
    """Keep the k largest, of equals those with the lowest ids."""
    values, found = np.empty(k, dtype=np.float32), np.empty(k, dtype=np.int64)
    largest_tokens(line[:count], k, np.float32(-np.inf), values, found)
    found.sort()
    for i in range(k):
        line[i], ids[i] = line[found[i]], ids[found[i]]
    return k


@compiled()
def _key(value: Any, highest: Any, typical: bool, log_total: float, entropy: float) -> float:
    """What candidates are ranked by, ascending: how far below the largest, or how far the surprise is from the entropy."""
    below = np.float64(value - highest)
    return abs(log_total - below - entropy) if typical else -below


@compiled()
def _bins_of(
    line: Any, highest: Any, typical: bool, log_total: float, entropy: float, low: float, step: float, found: Any
) -> None:
    """Fill ``found`` with each candidate's bin: the keys from ``low`` on, ``step`` bins for each unit of them."""
    for i in range(line.shape[0]):
        place = (_key(line[i], highest, typical, log_total, entropy) - low) * step
        found[i] = np.int32(place if place < _BINS - 1 else _BINS - 1)


@compiled()
def _share_among_bins(
    line: Any,
    count: int,
    highest: Any,
    typical: bool,
    log_total: float,
    entropy: float,
    low: float,
    step: float,
    masses: Any,
    sizes: Any,
) -> None:
    """Add all candidates' weights and number to those of their bins; vector instructions find both of each candidate."""
    weights, bins = np.empty(BLOCK, dtype=np.float32), np.empty(BLOCK, dtype=np.int32)
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        part = line[start : start + length]
        weigh(part, highest, weights[:length])
        _bins_of(part, highest, typical, log_total, entropy, low, step, bins[:length])
        for i in range(length):
            masses[bins[i]] += np.float64(weights[i])
            sizes[bins[i]] += 1


@compiled()
def _inside(
    line: Any,
    count: int,
    highest: Any,
    typical: bool,
    log_total: float,
    entropy: float,
    low: float,
    step: float,
    border: int,
    members: Any,
) -> None:
    """Fill ``members`` with the indices of the candidates in the bin ``border``."""
    bins, size = np.empty(BLOCK, dtype=np.int32), 0
    for start in range(0, count, BLOCK):
        length = min(BLOCK, count - start)
        _bins_of(line[start : start + length], highest, typical, log_total, entropy, low, step, bins[:length])
        for i in range(length):
            if bins[i] == border:
                members[size] = start + i
                size += 1


@compiled()
def _keep_mass(line: Any, ids: Any, count: int, typical: bool, limit: float) -> int:
    """Keep candidates before which there is less mass than ``limit``; where ``typical``, as much as it at most.

    The border is found by sharing candidates among bins of their keys, and the border's bin among bins again, so that only a
    few are ever put in order.
    """
    highest = largest(line[:count])
    total, entropy = _total_and_entropy(line, count, highest) if typical else (total_weight(line, count, highest), 0.0)
    log_total = np.log(total)
    if not (typical or limit > 0.0):
        best = _best(line, count)
        line[0], ids[0] = line[best], ids[best]
        return 1
    if not typical:
        # Candidates below this weigh less, all taken together, than what is left out: the border is among the others. A little
        # lower, so that rounding decides nothing.
        count = _keep_within(line, ids, count, np.log(0.999 * (1.0 - limit) / count) + log_total)
    limit *= total
    members = np.arange(0)  # all, at first
    size, before = count, 0.0
    masses, sizes = np.empty(_BINS, dtype=np.float64), np.empty(_BINS, dtype=np.int64)
    first = True
    while True:
        if first:
            furthest = float(smallest(line[:count]) - highest)
            low, high = 0.0, -furthest
            if typical:
                high = max(abs(log_total - entropy), abs(log_total - furthest - entropy))
        else:
            low, high = np.inf, -np.inf
            for member in members:
                key = _key(line[member], highest, typical, log_total, entropy)
                low, high = min(low, key), max(high, key)
            if size <= _FEW or not high > low:
                break
        step = _BINS / (high - low) if high > low else 0.0
        step = step if np.isfinite(step) else 0.0
        masses[:], sizes[:] = 0.0, 0
        if first:
            _share_among_bins(line, count, highest, typical, log_total, entropy, low, step, masses, sizes)
        else:
            for member in members:
                where = min(int((_key(line[member], highest, typical, log_total, entropy) - low) * step), _BINS - 1)
                masses[where] += exponential(line[member] - highest)
                sizes[where] += 1
        border, begun = 0, before
        while border < _BINS and (before + masses[border] <= limit if typical else before + masses[border] < limit):
            before += masses[border]
            border += 1
        if border == _BINS:
            if first:
                return count
            before = begun
            break  # rounding: the border is the end of what is looked at
        inside = np.empty(sizes[border], dtype=np.int64)
        size, found = sizes[border], size
        if first:
            _inside(line, count, highest, typical, log_total, entropy, low, step, border, inside)
        else:
            place = 0
            for member in members:
                if min(int((_key(line[member], highest, typical, log_total, entropy) - low) * step), _BINS - 1) == border:
                    inside[place] = member
                    place += 1
        if not first and size == found:
            break  # nothing tells them apart any more
        members, first = inside, False
    keys = np.empty(size, dtype=np.float64)
    for m in range(size):
        keys[m] = _key(line[members[m]], highest, typical, log_total, entropy)
    order = np.argsort(keys, kind="mergesort")
    last_key, last_index = -1.0, -1
    for m in order:
        if not (before <= limit if typical else before < limit):
            break
        last_key, last_index = keys[m], members[m]
        before += exponential(line[members[m]] - highest)
    kept = 0
    for i in range(count):
        key = _key(line[i], highest, typical, log_total, entropy)
        if key < last_key or (key == last_key and i <= last_index):
            line[kept], ids[kept] = line[i], ids[i]
            kept += 1
    return kept


@compiled()
def _least_of_top_choices(line: Any, count: int, border: float) -> Any:
    """Index of the least probable of XTC's top choices, of equals that with the highest id, and how many there are.

    A top choice weighs at least ``border``.
    """
    highest = largest(line[:count])
    # Rounding decides nothing between this and the border, and few exponentials are asked for.
    near = np.log(border) - 1e-4 if border > 0 else -np.inf
    found, least = 0, -1
    for i in range(count):
        if line[i] - highest >= near and exponential(line[i] - highest) >= border:
            found += 1
            if least < 0 or line[i] <= line[least]:
                least = i
    return least, found


@compiled()
def _penalise(line: Any, ids: Any, count: int, places: Any, penalties: Any) -> int:
    """Take penalties off candidates' logits."""
    indices, lowered = np.empty(len(places), dtype=np.int64), np.empty(len(places), dtype=np.float32)
    for p in range(len(places)):
        index = np.searchsorted(ids[:count], places[p])
        if penalties[p] > 0 and index < count and ids[index] == places[p]:
            indices[p], lowered[p] = index, line[index] - penalties[p]
        else:
            indices[p] = -1
    for p in range(len(places)):
        if indices[p] >= 0:
            line[indices[p]] = min(line[indices[p]], lowered[p])
    return count


@compiled()
def _write(line: Any, ids: Any, count: int, greedy: bool) -> None:
    """Put candidates at the front of a row back to their places, as log-probabilities."""
    if greedy:
        token = ids[_best(line, count)]
        line[:] = -np.inf
        line[token] = 0.0
        return
    highest = largest(line[:count])
    _subtract(line[:count], highest, np.float32(np.log(total_weight(line, count, highest))))
    _put_back(line, ids, count, np.float32(-np.inf))


@compiled()
def _put_back(line: Any, ids: Any, count: int, dropped: Any) -> None:
    """Move what stands at the front of a row to its tokens' places; elsewhere stands ``dropped``."""
    end = line.shape[0]
    if count == end:  # each stands in its place
        return
    # From the end: no candidate's place is before its index.
    for i in range(count - 1, -1, -1):
        value, token_id = line[i], ids[i]
        for between in range(token_id + 1, end):
            line[between] = dropped
        line[token_id] = value
        end = token_id
    line[:end] = dropped


@compiled()
def _subtract(line: Any, highest: Any, log_total: Any) -> None:
    """Replace each l by l - highest - log_total."""
    for i in range(line.shape[0]):
        line[i] = (line[i] - highest) - log_total


@compiled()
def _write_excluding(
    line: Any, ids: Any, count: int, least: int, number: int, total: float, probability: float, greedy: bool
) -> None:
    """What :func:`_write` does, where XTC comes last: ``number`` top choices, all but the least, have none of this share.

    Both sides of the coin weigh the others alike, so these stay in proportion, and no exponential of them is asked for.
    """
    highest, border = largest(line[:count]), line[least]
    tops, found, excluded = np.empty(number, dtype=np.int64), 0, 0.0
    for i in range(count):
        if line[i] > border or (line[i] == border and i < least):
            tops[found] = i
            found += 1
            excluded += np.float64(exponential(line[i] - highest))
    if total - excluded > 1e-6 * total:
        log_left = np.log(total - excluded)
    else:  # digits have cancelled
        left = 0.0
        for i in range(count):
            if line[i] < border or (line[i] == border and i >= least):
                left += np.float64(exponential(line[i] - border))
        log_left = np.log(left) + np.float64(border - highest)
    # What has a share of both sides, and what has one of the first alone.
    log_excluded = np.log((1 - probability) / total) if probability < 1 else -np.inf
    log_other = np.log(probability) - log_left
    log_share = max(log_excluded, log_other) + np.log1p(np.exp(-abs(log_excluded - log_other)))
    # Of the others the largest is the border's, which may be far below the row's.
    alone = np.empty(number, dtype=np.float32)
    for index in range(number):
        alone[index] = np.float64(line[tops[index]] - highest) + log_excluded
    _subtract(line[:count], border, np.float32(-(log_share + np.float64(border - highest))))
    for index in range(number):
        line[tops[index]] = alone[index]
    if greedy:
        token = ids[_best(line, count)]
        line[:] = -np.inf
        line[token] = 0.0
        return
    _put_back(line, ids, count, np.float32(-np.inf))


@compiled()
def _write_mixture(
    line: Any, ids: Any, count: int, rest: Any, rest_ids: Any, left: int, probability: float, greedy: bool
) -> None:
    """The same of two parts, the second of which has this probability."""
    highest, highest_left = largest(line[:count]), largest(rest[:left])
    share = (1 - probability) / total_weight(line, count, highest)
    share_left = probability / total_weight(rest, left, highest_left)
    for i in range(count):
        line[i] = share * exponential(line[i] - highest)
    _put_back(line, ids, count, np.float32(0.0))
    for i in range(left):
        line[rest_ids[i]] += share_left * exponential(rest[i] - highest_left)
    if greedy:
        token = _best(line, line.shape[0])
        line[:] = -np.inf
        line[token] = 0.0
        return
    for token_id in range(line.shape[0]):
        line[token_id] = np.log(line[token_id]) if line[token_id] > 0 else -np.inf
