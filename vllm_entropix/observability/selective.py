"""How well a score tells wrong answers from right ones: AUROC, risk and coverage, and thresholds, with intervals.

Answers to one item (a question that was asked several times) resemble one another, so intervals come from a bootstrap that
draws items: all answers to an item are in a resample as often as the item is. A resample is a row of weights, and every figure
is computed of weighted answers, all resamples at once.

Nothing here knows of traces: doubts, marks and items come as arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vllm_entropix.settings.errors import ConfigError

# Weights that are held at a time: 32 MB.
_CELLS = 1 << 22
# Coverages at which a risk-coverage curve is told.
COVERAGES = tuple(round(0.05 * step, 2) for step in range(1, 21))
# Two-sided level of all intervals.
LEVEL = 0.95


@lru_cache(maxsize=4)
def _drawn(items: int, resamples: int, seed: int) -> np.ndarray:
    """How often each item is in each resample, ``[resamples, items]``: drawn once for all scores and figures."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(items, np.full(items, 1 / items), size=resamples).astype(np.uint16)


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and where it lies in 95 % of the resamples.

    Attributes:
        value: of the answers themselves; NaN if it can't be told.
        low: percentile 2.5 of the resamples.
        high: percentile 97.5.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> Interval:
        """An estimate and its resamples; those that can't be told (NaN) are left out."""
        known = resampled[np.isfinite(resampled)]
        if not len(known):
            return cls(value, float("nan"), float("nan"))
        low, high = np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return cls(value, float(low), float(high))


@dataclass(frozen=True, slots=True)
class Threshold:
    """Where to draw the line, and what it is worth.

    Attributes:
        doubt: answers whose doubt is greater abstain.
        accuracy: share of right ones among the answers that are given.
        coverage: share of the answers that are given.
        held_out_accuracy: the same on items that the threshold wasn't chosen on: chosen on a resample, and judged on the items
            that it left out.
        held_out_coverage: likewise.
    """

    doubt: float
    accuracy: float
    coverage: float
    held_out_accuracy: Interval
    held_out_coverage: Interval


class Answers:
    """Answers sorted by doubt, the surest first, and the resamples of their items.

    Args:
        doubts: float ``[answers]``, finite; the greater, the less sure.
        wrong: bool ``[answers]``.
        items: integers ``[answers]``, which item each answers.
        resamples: number of them.
        seed: of the resamples; the same items give the same resamples whatever the doubts are, so that figures of two scores
            can be subtracted resample by resample.
    """

    def __init__(self, doubts: np.ndarray, wrong: np.ndarray, items: np.ndarray, resamples: int, seed: int) -> None:
        order = np.argsort(doubts, kind="stable")
        self._doubts = doubts[order].astype(np.float64)
        self._wrong = wrong[order].astype(np.float64)
        self._items = np.unique(items, return_inverse=True)[1][order]
        self._resamples, self._seed = resamples, seed
        # Equal doubts can't be told apart: a threshold takes all of them, or none.
        self._starts = np.flatnonzero(np.r_[True, np.diff(self._doubts) > 0])

    def _weights(self) -> Iterator[np.ndarray]:
        """Float ``[some resamples, answers]``, all resamples in parts."""
        drawn = _drawn(int(self._items.max()) + 1, self._resamples, self._seed)
        part = max(1, _CELLS // len(self._items))
        for start in range(0, self._resamples, part):
            yield drawn[start : start + part, self._items].astype(np.float64)

    def _ties(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight of the wrong and of the right answers of each group of equal doubts, ``[resamples, groups]``."""
        wrong = np.add.reduceat(weights * self._wrong, self._starts, axis=-1)
        right = np.add.reduceat(weights * (1 - self._wrong), self._starts, axis=-1)
        return wrong, right

    def _auroc(self, weights: np.ndarray) -> np.ndarray:
        """Probability that a wrong answer has a greater doubt than a right one, ties counting half, ``[resamples]``."""
        wrong, right = self._ties(weights)
        surer = np.cumsum(right, axis=-1) - right
        pairs = wrong.sum(axis=-1) * right.sum(axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: np.ndarray = (wrong * (surer + right / 2)).sum(axis=-1) / pairs
        return found

    def auroc(self) -> tuple[Interval, np.ndarray]:
        """The AUROC, and that of each resample."""
        resampled = np.concatenate([self._auroc(weights) for weights in self._weights()])
        return Interval.of(float(self._auroc(np.ones((1, len(self._wrong))))[0]), resampled), resampled

    def _curve(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coverage and risk with each group of equal doubts as the last that is given, ``[resamples, groups]`` each."""
        wrong, right = self._ties(weights)
        errors, given = np.cumsum(wrong, axis=-1), np.cumsum(wrong + right, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return given / given[:, -1:], errors / given

    def _risks(self, weights: np.ndarray) -> np.ndarray:
        """Risk at each of COVERAGES, ``[resamples, coverages]``: with the first group at which so much is given."""
        coverage, risk = self._curve(weights)
        reached = (coverage[:, None, :] < np.array(COVERAGES)[None, :, None] - 1e-12).sum(axis=-1)
        found: np.ndarray = np.take_along_axis(risk, reached.clip(max=risk.shape[1] - 1), axis=1)
        return found

    def risks(self) -> list[Interval]:
        """Share of wrong ones among the answers that are given, at each of COVERAGES."""
        resampled = np.concatenate([self._risks(weights) for weights in self._weights()])
        here = self._risks(np.ones((1, len(self._wrong))))[0]
        return [Interval.of(float(value), resampled[:, index]) for index, value in enumerate(here)]

    def area(self) -> Interval:
        """Area under the risk-coverage curve: the mean risk over all answers as the last that is given."""

        def of(weights: np.ndarray) -> np.ndarray:
            coverage, risk = self._curve(weights)
            widths = np.diff(coverage, axis=-1, prepend=0.0)
            area: np.ndarray = (widths * np.nan_to_num(risk)).sum(axis=-1)
            return area

        resampled = np.concatenate([of(weights) for weights in self._weights()])
        return Interval.of(float(of(np.ones((1, len(self._wrong))))[0]), resampled)

    def _choose(self, weights: np.ndarray, accuracy: float | None, coverage: float | None) -> np.ndarray:
        """Index of the last group that is given in each resample, ``[resamples]``; -1 where nothing is good enough."""
        covered, risk = self._curve(weights)
        if coverage is not None:
            reached: np.ndarray = (covered < coverage - 1e-12).sum(axis=-1).clip(max=covered.shape[1] - 1)
            return reached
        assert accuracy is not None
        good = np.nan_to_num(risk, nan=1.0) <= 1 - accuracy + 1e-12
        last = good.shape[1] - 1 - np.argmax(good[:, ::-1], axis=-1)
        return np.where(good.any(axis=-1), last, -1)

    def threshold(self, accuracy: float | None = None, coverage: float | None = None) -> Threshold:
        """The threshold that gives the most answers at an accuracy, or the surest at a coverage.

        Args:
            accuracy: share of right ones that the answers given are to have at least.
            coverage: share of the answers that are to be given at least; one of the two is None.

        Raises:
            ConfigError: not even the surest answers are so often right.
        """
        everything = np.ones((1, len(self._wrong)))
        chosen = int(self._choose(everything, accuracy, coverage)[0])
        covered, risk = (of[0] for of in self._curve(everything))
        if chosen < 0:
            raise ConfigError(
                f"no threshold reaches an accuracy of {accuracy:g}: the surest answers have {1 - risk.min():.3g} at best"
            )
        groups = np.repeat(np.arange(len(self._starts)), np.diff(np.r_[self._starts, len(self._wrong)]))
        accuracies, coverages = [], []
        for weights in self._weights():
            last = self._choose(weights, accuracy, coverage)
            left_out = (weights == 0).astype(np.float64)
            given = left_out * (groups[None, :] <= last[:, None])
            with np.errstate(invalid="ignore", divide="ignore"):
                accuracies.append(1 - (given * self._wrong).sum(axis=-1) / given.sum(axis=-1))
                coverages.append(given.sum(axis=-1) / left_out.sum(axis=-1))
        held_out = [np.concatenate(parts) for parts in (accuracies, coverages)]
        means = [float(np.nanmean(of)) if np.isfinite(of).any() else float("nan") for of in held_out]
        return Threshold(
            doubt=float(self._doubts[self._starts[chosen]]),
            accuracy=float(1 - risk[chosen]),
            coverage=float(covered[chosen]),
            held_out_accuracy=Interval.of(means[0], held_out[0]),
            held_out_coverage=Interval.of(means[1], held_out[1]),
        )
