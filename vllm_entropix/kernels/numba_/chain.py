"""A chain's filters and temperatures, row by row: what ``samplers.chain.outcome`` does, with no vocabulary in order but tfs's.

What is known of a row's candidates goes from stage to stage, so that none asks the whole vocabulary for it again:

- ``count``: how many stand at the front of the row;
- ``low``, ``high``: no logit is smaller than the one, and the other is the largest;
- ``least``, ``most``: the band that they are still to be dropped outside of, if it is narrower;
- ``total``: the weight exp(l - high) of what is in the band; 0 where nobody has asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.chains import STAGES, numbers_of
from vllm_entropix.kernels.numba_.candidates import (
    at_least,
    drop,
    first_of,
    index_of,
    keep_alone,
    largest_up_to,
    put_back,
    token_of,
)
from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.curvature import band_of_curvature
from vllm_entropix.kernels.numba_.distribute import largest_beside_nan, largest_tokens
from vllm_entropix.kernels.numba_.elementary import exponential, extremes, largest, rounded_up
from vllm_entropix.kernels.numba_.entropies import band_of_entropy
from vllm_entropix.kernels.numba_.mass import band_of_mass
from vllm_entropix.kernels.numba_.repetitions import repetitions_of_rows
from vllm_entropix.kernels.numba_.weights import (
    BLOCK,
    total_and_entropy,
    total_and_squares,
    total_weight,
    total_weight_within,
    weigh,
)

_TEMPERATURE, _DYNATEMP, _EDT = (STAGES.index(name) for name in ("temperature", "dynatemp", "edt"))
_TOP_K, _TOP_P, _TYP_P = (STAGES.index(name) for name in ("top_k", "top_p", "typ_p"))
_MIN_P, _TOP_N_SIGMA, _EPSILON, _ETA = (STAGES.index(name) for name in ("min_p", "top_n_sigma", "epsilon", "eta"))
_GREEDY_THRESHOLD, _P_LESS, _TOP_A = (STAGES.index(name) for name in ("greedy_threshold", "p_less", "top_a"))
_XTC, _DRY, _PENALTIES, _QUADRATIC = (STAGES.index(name) for name in ("xtc", "dry", "penalties", "quadratic"))
_TOP_H, _MIROSTAT, _MIROSTAT_V2, _ADAPTIVE_P = map(STAGES.index, ("top_h", "mirostat", "mirostat_v2", "adaptive_p"))
_TFS = STAGES.index("tfs")
_NUMBERS = numbers_of("numba")
_T, _RANGE, _EXPONENT, _THETA = map(_NUMBERS.index, ("temperature", "dynatemp_range", "dynatemp_exponent", "edt_theta"))
_K, _P, _TYPICAL = map(_NUMBERS.index, ("top_k", "top_p", "typ_p"))
_MIN, _SIGMAS, _EPSILON_CUTOFF, _ETA_CUTOFF = map(_NUMBERS.index, ("min_p", "top_n_sigma", "epsilon_cutoff", "eta_cutoff"))
_SURE, _A = map(_NUMBERS.index, ("greedy_threshold", "top_a"))
_PI, _THRESHOLD = map(_NUMBERS.index, ("xtc_probability", "xtc_threshold"))
_LAST_N, _REPEAT = map(_NUMBERS.index, ("repeat_last_n", "repeat_penalty"))
_FREQUENCY, _PRESENCE = map(_NUMBERS.index, ("frequency_penalty", "presence_penalty"))
_FACTOR, _CURVE = map(_NUMBERS.index, ("smoothing_factor", "smoothing_curve"))
_H, _TARGET, _Z = map(_NUMBERS.index, ("top_h", "adaptive_target", "tfs_z"))
# Behind them stands the number that a stage follows the draws by.
_STATE = len(_NUMBERS)
# Of sums and ratios, as of float32: see ``distribution.survivors``.
_SLACK = 16 * float(np.finfo(np.float32).eps)
# adaptive_p's logit at the target, how steeply it falls, and the distance that counts as 1.
_PEAK, _SHARPNESS, _WIDTH = np.float32(5.0), np.float32(10.0), np.float32(0.3)
# Ranks that mirostat estimates the exponent of Zipf's law from.
_RANKS = 100
# Temperatures below this are as good as 0.
_COLDEST = 1e-38
# What is below was dropped.
_LOWEST = np.float32(np.finfo(np.float32).min)
# Further below the largest logit, differences have lost digits that count, and sums of weights too.
_FAR = np.float32(16.0)


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
    tokens: Any,
    shares: Any,
    handed: Any,
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
        numbers: float64 ``[rows, any]``, in the order of ``numbers_of("numba")``, and last the state of mirostat or adaptive_p.
        places: int64 ``[rows, any]``, tokens that DRY penalises; one may come several times, and the largest penalty counts.
        penalties: float32, of the same shape; 0 where there is none.
        tokens: int64 ``[rows, any]``, each row's text up to here, aligned to the right; -1 stands before the first.
        shares: float32 ``[rows]``, written: the share of the distribution in which XTC excluded top choices.
        handed: float32 ``[rows, vocab]`` for a chain with adaptive_p, written: the probabilities that it is handed.
        first_row: where to begin.
        last_row: where to end.
    """
    vocabulary = logits.shape[1]
    ids, spare = np.empty(vocabulary, dtype=np.int32), np.empty(vocabulary, dtype=np.int32)
    # What is put in order; pages that are asked for anew with each row cost more than its sort.
    ordered = vocabulary if (stages == _TFS).any() else 0
    room = np.empty(ordered, dtype=np.float32), np.empty(ordered, dtype=np.float64)
    split = len(stages)
    for index in range(len(stages)):
        if stages[index] == _XTC:
            split = index
    before, behind = stages[:split], stages[split + 1 :]
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
            if handed.shape[1] > 0:
                handed[row][:] = 0.0
                handed[row][token[0]] = 1.0
            continue
        low, high = extremes(line)
        state = vocabulary, low, high, max(low, _LOWEST), high, 0.0
        text = places[row], penalties[row], tokens[row], handed[row]
        state = _through(before, own, text, line, ids, spare, room, state)
        tops, which = 0, 0
        if split < len(stages) and own[_PI] > 0 and own[_THRESHOLD] <= 0.5:
            count, low, high, total = _settled(line, ids, state)
            total = total if total > 0 else total_weight(line, count, high)
            state = count, low, high, low, high, total
            tops, which = _top_choices(line, count, high, own[_THRESHOLD] * (1 - _SLACK) * total, spare)
        if tops < 2:
            state = _through(behind, own, text, line, ids, spare, room, state)
            _write(line, ids, state, greedy[row])
            continue
        shares[row] = own[_PI]
        if not len(behind):
            _write_excluding(line, ids, state, spare[:tops], which, own[_PI], greedy[row])
            continue
        # The other side of the coin: without the top choices but the least probable of them.
        count = state[0]
        rest, rest_ids = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.int32)
        left, top = 0, 0
        for i in range(count):
            if top < tops and i == spare[top]:
                top += 1
                if top - 1 != which:
                    continue
            rest[left], rest_ids[left] = line[i], token_of(line, ids, count, i)
            left += 1
        low_left, high_left = extremes(rest[:left])
        other = left, low_left, high_left, low_left, high_left, 0.0
        state = _through(behind, own, text, line, ids, spare, room, state)
        other = _through(behind, own, text, rest, rest_ids, spare, room, other)
        _write_mixture(line, ids, state, rest, rest_ids, other, own[_PI], greedy[row])


def compile_for_steps() -> None:
    """Compile what steps call of chains, or load it from disk: on arrays of their types, and on no rows."""
    rows = np.zeros(1, dtype=np.bool_), np.zeros(1, dtype=np.bool_), np.zeros(1, dtype=np.float32)
    stages, numbers = np.zeros(1, dtype=np.int64), np.zeros((1, len(_NUMBERS) + 1))
    places, penalties = np.zeros((1, 0), dtype=np.int64), np.zeros((1, 0), dtype=np.float32)
    tokens, shares = np.zeros((1, 2), dtype=np.int64), np.zeros(1, dtype=np.float32)
    written = np.zeros((1, 1), dtype=np.float32), np.zeros((1, 0), dtype=np.float32)
    chain_of_rows(written[0], *rows, stages, numbers, places, penalties, tokens, shares, written[1], 0, 0)
    repetitions_of_rows(tokens, tokens[:, :1].copy(), tokens[:, 1:].copy(), 0, 0)


@compiled()
def _settled(line: Any, ids: Any, state: Any) -> Any:
    """Drop the candidates outside their band: ``count``, ``low``, ``high`` and ``total`` of those that are left."""
    count, low, high, least, most, total = state
    if least <= low and most >= high:
        return count, low, high, total
    count = drop(line, ids, count, least, most)
    if most < high:
        return count, least, largest(line[:count]), 0.0
    return count, least, high, total


@compiled()
def _through(stages: Any, own: Any, text: Any, line: Any, ids: Any, spare: Any, room: Any, state: Any) -> Any:
    """Run candidates through stages; what is known of those that are left."""
    for stage in stages:
        count, low, high, total = _settled(line, ids, state)
        least, most, distance = low, high, -np.inf
        if stage in (_TEMPERATURE, _DYNATEMP, _EDT):
            temperature = own[_T]
            if stage == _DYNATEMP and own[_RANGE] > 0:
                temperature = _dynamic(line, count, high, own)
            elif stage == _EDT and own[_THETA] > 0:
                temperature = _by_entropy(line, count, high, own)
            if temperature > 0:
                factor = np.float32(1 / max(temperature, _COLDEST))
                _multiply(line[:count], high, factor)
                low, high, total = (low - high) * factor, np.float32(0.0), 0.0
                least, most = max(low, _LOWEST), high
            else:
                distance = np.inf
        elif stage in (_TOP_K, _MIROSTAT):
            k = own[_K] if stage == _TOP_K else _by_zipf(line[:count], own[_STATE], len(spare))
            if 0 < k < count:
                count, least = _most_probable(line, ids, count, int(k))
                low, total = least, 0.0
        elif stage == _TOP_P:
            if own[_P] < 1:
                least, most, total, dropped = band_of_mass(line, count, low, high, False, own[_P] - _SLACK, spare)
                low = np.float32(-np.inf) if dropped else low
        elif stage == _MIN_P:
            if own[_MIN] > 0:
                distance = np.log(own[_MIN] * (1 - _SLACK))
        elif stage == _TOP_N_SIGMA:
            if own[_SIGMAS] > 0:
                distance = -own[_SIGMAS] * _spread(line[:count], high) * (1 + _SLACK)
        elif stage == _TOP_H:
            if own[_H] < 1:
                least, total, dropped = band_of_entropy(line, count, low, high, own[_H], _SLACK, spare)
                low = np.float32(-np.inf) if dropped else low
        elif stage == _TFS:
            if own[_Z] < 1 and count > 2:
                least, total, dropped = band_of_curvature(line, count, high, own[_Z], _SLACK, room, spare)
                low = np.float32(-np.inf) if dropped else low
        elif stage in (_EPSILON, _ETA, _GREEDY_THRESHOLD, _P_LESS, _TOP_A, _MIROSTAT_V2):
            distance, total = _distance_of(stage, own, line, count, high, total)
        elif stage == _TYP_P:
            if own[_TYPICAL] < 1:
                least, most, total, dropped = band_of_mass(line, count, low, high, True, own[_TYPICAL] + _SLACK, spare)
                low = np.float32(-np.inf) if dropped else low
                total = total if high - most < _FAR else 0.0
        elif stage in (_DRY, _PENALTIES, _QUADRATIC, _ADAPTIVE_P):
            if stage == _ADAPTIVE_P:
                total = total if total > 0 else total_weight(line, count, high)
                _adapt(line, ids, count, high, total, own, text[3])
            elif stage == _DRY:
                _penalise(line, ids, count, text[0], text[1])
            elif stage == _PENALTIES:
                _penalise_repeated(line, ids, count, text[2], own)
            elif own[_FACTOR] > 0:
                _bend(line[:count], high, np.float32(own[_FACTOR]), np.float32(own[_CURVE]))
            low, high = extremes(line[:count])
            least, most, total = max(low, _LOWEST), high, 0.0
        if distance > 0:
            count = keep_alone(line, ids, count, first_of(line, count, high))
            low, least, total = high, high, 1.0
        elif distance > -np.inf:
            least = rounded_up(np.float64(high) + distance)
            total = total if least <= low else 0.0
        state = count, low, high, least, most, total
    return state


# The order of the sums is LLVM's, so that it may add several side by side.
@compiled(fastmath={"reassoc", "nsz"})
def _spread(line: Any, high: Any) -> float:
    """Population standard deviation of the candidates' logits."""
    mean, square = 0.0, 0.0
    for i in range(line.shape[0]):
        mean += np.float64(line[i] - high)
    mean /= line.shape[0]
    for i in range(line.shape[0]):
        deviation = np.float64(line[i] - high) - mean
        square += deviation * deviation
    return float(np.sqrt(square / line.shape[0]))


@compiled()
def _dynamic(line: Any, count: int, high: Any, own: Any) -> float:
    """dynatemp's temperature."""
    if count < 2:
        return 1.0
    share = total_and_entropy(line, count, high)[1] / np.log(count)
    low, high = max(own[_T] - own[_RANGE], 0.0), own[_T] + own[_RANGE]
    return float(low + (high - low) * min(max(share, 0.0), 1.0) ** own[_EXPONENT])


@compiled()
def _by_entropy(line: Any, count: int, high: Any, own: Any) -> float:
    """EDT's temperature."""
    entropy = total_and_entropy(line, count, high)[1]
    return float(own[_T] * 0.8 ** (own[_THETA] / entropy)) if entropy > 0 else 0.0


@compiled()
def _distance_of(stage: int, own: Any, line: Any, count: int, high: Any, total: float) -> Any:
    """How far below the largest logit those lie that a floor of probabilities keeps, and the candidates' weight.

    -inf keeps all, and what is above 0 the most probable alone.
    """
    if stage == _ETA and own[_ETA_CUTOFF] > 0:
        total, entropy = total_and_entropy(line, count, high)
        floor = min(own[_ETA_CUTOFF], np.sqrt(own[_ETA_CUTOFF]) * np.exp(-entropy)) * total
    elif stage == _P_LESS:
        total, squares = total_and_squares(line, count, high)
        floor = squares / total
    else:
        total = total if total > 0 else total_weight(line, count, high)
        if stage == _MIROSTAT_V2:
            return np.log(total) - own[_STATE] * np.log(2.0) - _SLACK, total
        if stage == _GREEDY_THRESHOLD:
            return np.inf if np.float32(1 / total) < np.float32(own[_SURE]) else -np.inf, total
        floor = own[_EPSILON_CUTOFF] * total if stage == _EPSILON else own[_A] / total if stage == _TOP_A else 0.0
    return np.log(floor * (1 - _SLACK)) if floor > 0 else -np.inf, total


@compiled()
def _by_zipf(line: Any, mu: float, vocabulary: int) -> float:
    """How many candidates mirostat keeps by their fall over the first ranks, at least one."""
    ranks = min(len(line), _RANKS)
    values, found = np.empty(ranks, dtype=np.float32), np.empty(ranks, dtype=np.int64)
    largest_tokens(line, ranks, np.float32(-np.inf), values, found)
    falls, squares = 0.0, 0.0
    for i in range(ranks - 1):
        step = np.log((i + 2) / (i + 1))
        falls += step * np.float64(values[i] - values[i + 1])
        squares += step * step
    if not falls > 0:  # of equals, all or one
        return np.inf if ranks > 1 and 2.0**mu > _zipf_scale(-1.0, vocabulary) else 1.0
    exponent = falls / squares
    k = (2.0**mu / _zipf_scale(exponent - 1, vocabulary)) ** (1 / exponent)
    return 1.0 if np.isnan(k) else max(float(np.floor(k)), 1.0)


@compiled()
def _zipf_scale(epsilon: float, vocabulary: int) -> float:
    """(1 - N^-ε) / ε."""
    return float(-np.expm1(-epsilon * np.log(vocabulary)) / epsilon if epsilon != 0 else np.log(vocabulary))


@compiled()
def _bend(line: Any, high: Any, factor: Any, curve: Any) -> None:
    """Replace each l by quadratic's parabola, without the largest logit, which is a constant."""
    cubic, square = (curve - np.float32(1)) / np.float32(2), (np.float32(3) - curve) / np.float32(2)
    for i in range(line.shape[0]):
        below = line[i] - high
        line[i] = factor * (below * below) * (cubic * below - square)


@compiled()
def _adapt(line: Any, ids: Any, count: int, high: Any, total: float, own: Any, handed: Any) -> None:
    """Tell how probable candidates are, and replace each l by adaptive_p's hump around the target, if there is one."""
    share, target = np.float32(1 / total), np.float32(min(max(2 * own[_TARGET] - own[_STATE], 0.0), 1.0))
    weights = np.empty(BLOCK, dtype=np.float32)
    if count < line.shape[0]:
        handed[:] = 0.0
    for start in range(0, count, BLOCK):
        part = line[start : min(start + BLOCK, count)]
        probabilities = weights[: part.shape[0]]
        weigh(part, high, probabilities)
        for i in range(part.shape[0]):
            probabilities[i] *= share
        if count == line.shape[0]:
            handed[start : start + part.shape[0]] = probabilities
        else:
            for i in range(part.shape[0]):
                handed[ids[start + i]] = probabilities[i]
        if own[_TARGET] >= 0:
            _raise_near(probabilities, target, part)


@compiled()
def _raise_near(probabilities: Any, target: Any, line: Any) -> None:
    """adaptive_p's hump around the target, instead of these logits."""
    for i in range(line.shape[0]):
        distance = abs(probabilities[i] - target) / _WIDTH
        # Numba looks at the divisor of a plain division first, one by one.
        line[i] = _PEAK - _SHARPNESS * np.divide(distance * distance, np.float32(1) + distance)


@compiled()
def _multiply(line: Any, high: Any, factor: Any) -> None:
    """Replace each l by (l - high) · factor."""
    for i in range(line.shape[0]):
        line[i] = (line[i] - high) * factor


@compiled()
def _most_probable(line: Any, ids: Any, count: int, k: int) -> Any:
    """Keep the k largest, of equals those with the lowest ids: how many are left, and the smallest."""
    values, found = np.empty(k, dtype=np.float32), np.empty(k, dtype=np.int64)
    largest_tokens(line[:count], k, np.float32(-np.inf), values, found)
    found.sort()
    for i in range(k):
        line[i], ids[i] = line[found[i]], token_of(line, ids, count, found[i])
    return k, values[k - 1]


@compiled()
def _penalise(line: Any, ids: Any, count: int, places: Any, penalties: Any) -> None:
    """Take penalties off candidates' logits."""
    indices, lowered = np.empty(len(places), dtype=np.int64), np.empty(len(places), dtype=np.float32)
    for p in range(len(places)):
        indices[p] = index_of(line, ids, count, places[p]) if penalties[p] > 0 else -1
        if indices[p] >= 0:
            lowered[p] = line[indices[p]] - penalties[p]
    for p in range(len(places)):
        if indices[p] >= 0:
            line[indices[p]] = min(line[indices[p]], lowered[p])


@compiled()
def _penalise_repeated(line: Any, ids: Any, count: int, tokens: Any, own: Any) -> None:
    """Make candidates less likely that are among the last tokens, by their number there."""
    last = len(tokens) if own[_LAST_N] < 0 else min(int(own[_LAST_N]), len(tokens))
    found = np.sort(tokens[len(tokens) - last :])
    begin = 0
    while begin < last:
        end = begin + 1
        while end < last and found[end] == found[begin]:
            end += 1
        index = index_of(line, ids, count, found[begin])
        if index >= 0:
            value = np.float64(line[index])
            value = value / own[_REPEAT] if value > 0 else value * own[_REPEAT]
            line[index] = value - (end - begin) * own[_FREQUENCY] - own[_PRESENCE]
        begin = end


@compiled()
def _top_choices(line: Any, count: int, high: Any, border: float, found: Any) -> Any:
    """Fill ``found`` with the indices of XTC's top choices, which weigh at least ``border``.

    How many there are, and which of them is the least probable, of equals that with the highest id.
    """
    # Rounding decides nothing between this and the border, and few exponentials are asked for.
    near = np.float64(high) + np.log(border) - 1e-4 if border > 0 else -np.inf
    tops, which = 0, 0
    for f in range(at_least(line, count, np.float32(near), found)):
        value = line[found[f]]
        if exponential(value - high) >= border:
            found[tops] = found[f]
            if value <= line[found[which]]:
                which = tops
            tops += 1
    return tops, which


@compiled()
def _write(line: Any, ids: Any, state: Any, greedy: bool) -> None:
    """Put candidates at the front of a row back to their places, as log-probabilities."""
    count, low, high, least, most, total = state
    if count < line.shape[0]:
        count, low, high, total = _settled(line, ids, state)
        least, most = low, high
    whole = least <= low and most >= high
    if most < high and (greedy or not total > 0):
        high = largest_up_to(line[:count], most)
    if greedy:
        _write_alone(line, token_of(line, ids, count, first_of(line, count, high)))
        return
    if not total > 0:
        total = total_weight(line, count, high) if whole else total_weight_within(line, count, high, least, most)
    _subtract(line[:count], high, np.float32(np.log(total)), least, most)
    put_back(line, ids, count, np.float32(-np.inf))


@compiled()
def _write_alone(line: Any, token: int) -> None:
    """A token has all of the probability."""
    line[:] = -np.inf
    line[token] = 0.0


@compiled()
def _subtract(line: Any, high: Any, log_total: Any, least: Any, most: Any) -> None:
    """Replace each l by l - high - log_total; those outside the band are dropped."""
    for i in range(line.shape[0]):
        kept = (line[i] >= least) & (line[i] <= most)
        line[i] = (line[i] - high) - log_total if kept else np.float32(-np.inf)


@compiled()
def _write_excluding(line: Any, ids: Any, state: Any, tops: Any, which: int, probability: float, greedy: bool) -> None:
    """What :func:`_write` does, where XTC comes last: all top choices but the least probable have none of this share.

    Both sides of the coin weigh the others alike, so these stay in proportion, and no exponential of them is asked for.
    """
    count, low, high, _, _, total = state
    border, excluded = line[tops[which]], 0.0
    for top in range(len(tops)):
        if top != which:
            excluded += np.float64(exponential(line[tops[top]] - high))
    if total - excluded > 1e-6 * total:
        log_left = np.log(total - excluded)
    else:  # digits have cancelled
        left = 0.0
        for i in range(count):
            if line[i] < border or (line[i] == border and i >= tops[which]):
                left += np.float64(exponential(line[i] - border))
        log_left = np.log(left) + np.float64(border - high)
    # What has a share of both sides, and what has one of the first alone.
    log_excluded = np.log((1 - probability) / total) if probability < 1 else -np.inf
    log_other = np.log(probability) - log_left
    log_share = max(log_excluded, log_other) + np.log1p(np.exp(-abs(log_excluded - log_other)))
    # Of the others the largest is the border's, which may be far below the row's.
    alone = np.empty(len(tops), dtype=np.float32)
    for top in range(len(tops)):
        alone[top] = np.float64(line[tops[top]] - high) + log_excluded
    _subtract(line[:count], border, np.float32(-(log_share + np.float64(border - high))), low, high)
    for top in range(len(tops)):
        if top != which:
            line[tops[top]] = alone[top]
    if greedy:
        _write_alone(line, token_of(line, ids, count, first_of(line, count, largest(line[:count]))))
        return
    put_back(line, ids, count, np.float32(-np.inf))


@compiled()
def _write_mixture(
    line: Any, ids: Any, state: Any, rest: Any, rest_ids: Any, other: Any, probability: float, greedy: bool
) -> None:
    """The same of two parts, the second of which has this probability."""
    count, _, high, total = _settled(line, ids, state)
    left, _, high_left, total_left = _settled(rest, rest_ids, other)
    share = (1 - probability) / (total if total > 0 else total_weight(line, count, high))
    share_left = probability / (total_left if total_left > 0 else total_weight(rest, left, high_left))
    for i in range(count):
        line[i] = share * exponential(line[i] - high)
    put_back(line, ids, count, np.float32(0.0))
    for i in range(left):
        line[rest_ids[i]] += share_left * exponential(rest[i] - high_left)
    if greedy:
        _write_alone(line, first_of(line, line.shape[0], largest(line)))
        return
    for token_id in range(line.shape[0]):
        line[token_id] = np.log(line[token_id]) if line[token_id] > 0 else -np.inf
