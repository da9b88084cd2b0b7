"""Statistics of a study. Nothing here knows of samplers: scores come as arrays, one number per item.

Answers to one item resemble one another, so the item is the unit of every interval and test: an item's score is the mean over
its draws, and two samplers are compared on the same items. Tasks count alike, however many items they have: a figure over
several tasks is the mean of the tasks' means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
FloatArray = np.ndarray


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its interval of 95 %."""

    value: float
    low: float
    high: float


def _mean_of_means(*tasks: FloatArray, axis: int = -1) -> FloatArray:
    mean: FloatArray = np.mean([np.mean(task, axis=axis) for task in tasks], axis=0)
    return mean


def mean(tasks: Sequence[FloatArray], resamples: int, seed: int) -> Interval:
    """Mean over tasks of the mean over items; the interval is the bootstrap's, which draws items within each task.

    For the difference of two samplers give the differences by item: a resample then has both on the same items.

    Args:
        tasks: float ``[items]`` of each task.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    value = float(_mean_of_means(*tasks))
    if all(np.ptp(task) == 0 for task in tasks):  # nothing to draw; scipy would warn
        return Interval(value, value, value)
    found = stats.bootstrap(
        tuple(tasks),
        _mean_of_means,
        n_resamples=resamples,
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        batch=max(1, (1 << 21) // max(map(len, tasks))),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def sign_flip(tasks: Sequence[FloatArray], resamples: int, seed: int) -> float:
    """Two-sided p-value of "the mean difference is 0": could each item's difference as well have the other sign?

    Exact where there are no more than ``resamples`` ways to choose the signs. The statistic is that of :func:`mean`.

    Args:
        tasks: differences by item, ``[items]`` of each task.
        resamples: choices of signs that are tried at most.
        seed: of the choice.
    """
    weighted = np.concatenate([task / (len(task) * len(tasks)) for task in tasks])
    weighted = weighted[weighted != 0]  # either sign of 0 is 0
    if len(weighted) < 2:  # one alone is as far from 0 with either sign
        return 1.0

    def total(sample: FloatArray, axis: int = -1) -> FloatArray:
        summed: FloatArray = sample.sum(axis=axis)
        return summed

    tested = stats.permutation_test(
        (weighted,),
        total,
        permutation_type="samples",
        n_resamples=resamples,
        vectorized=True,
        batch=max(1, (1 << 21) // len(weighted)),
        rng=np.random.default_rng(seed),
    )
    return float(tested.pvalue)


@dataclass(frozen=True, slots=True)
class McNemar:
    """Items that one of two samplers alone gets right, and the exact test of "either is as likely".

    Attributes:
        first: items that only the first gets right.
        second: items that only the second gets right.
        p: two-sided p-value; 1 if they agree on all.
    """

    first: int
    second: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """McNemar's exact test of two samplers with one answer per item.

    Args:
        first: was the item answered right, ``[items]``.
        second: the same items.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    discordant = only_first + only_second
    return McNemar(only_first, only_second, float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted after Holm (1979), in the order given: with those below 0.05 the chance of any error is below 0.05."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def expected_best(scores: Sequence[float]) -> list[float]:
    """Expected best of k configurations, drawn without replacement, for k = 1 to all of them.

    That of the sorted scores x(1) ≤ ... ≤ x(n) is Σ x(i)·C(i-1, k-1) / C(n, k): the best of k is x(i) if the other k - 1 are
    among the i - 1 below it.
    """
    ranked = sorted(scores)
    n = len(ranked)
    return [sum(x * math.comb(i, k - 1) for i, x in enumerate(ranked)) / math.comb(n, k) for k in range(1, n + 1)]


def pass_at(k: int, right: int, draws: int) -> float:
    """Probability that k of an item's draws, without replacement, have a right one (Chen et al., arXiv 2107.03374)."""
    if k > draws:
        raise ValueError(f"pass@{k} needs {k} draws, but there are {draws}")
    return 1 - math.comb(draws - right, k) / math.comb(draws, k)


def majority(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """Probability that the most frequent answer of an item's draws is right; of equally frequent ones any is chosen.

    Args:
        answers: what was extracted of each draw; None, where nothing was, is no vote.
        right: whether it is right. Equal answers are all right or all wrong.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    chosen = [answer for answer, count in votes.items() if count == most]
    correct = {answer for answer, is_right in zip(answers, right, strict=True) if is_right}
    return sum(answer in correct for answer in chosen) / len(chosen)


def distinct(answers: Iterable[Hashable]) -> int:
    """Number of different answers."""
    return len(set(answers))


def distinct_ngrams(texts: Sequence[str], n: int = 4) -> float:
    """Share of different ones among all n-grams of words in an item's draws; NaN if no text has n words."""
    grams = [tuple(words[start : start + n]) for words in map(str.split, texts) for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
