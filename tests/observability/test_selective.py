"""How well a score tells wrong from right: against scipy and by definition, with ties, items and odd data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from vllm_entropix.observability.selective import COVERAGES, Answers, Interval
from vllm_entropix.settings.errors import ConfigError


def answers(doubts, wrong, items=None, resamples=200, seed=0):
    doubts = np.asarray(doubts, dtype=float)
    items = np.arange(len(doubts)) if items is None else np.asarray(items)
    return Answers(doubts, np.asarray(wrong, dtype=bool), items, resamples, seed)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_the_auroc_is_scipys_ties_included(pairs):
    doubts, wrong = np.array([pair[0] for pair in pairs], float), np.array([pair[1] for pair in pairs])
    found = answers(doubts, wrong, resamples=100).auroc()[0].value
    if wrong.all() or not wrong.any():
        assert np.isnan(found)
        return
    expected = mannwhitneyu(doubts[wrong], doubts[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
    assert found == pytest.approx(expected)


def test_a_perfect_score_a_useless_one_and_its_opposite():
    wrong = [False] * 5 + [True] * 5
    assert answers(range(10), wrong).auroc()[0] == Interval(1, 1, 1)
    assert answers([1] * 10, wrong).auroc()[0].value == 0.5
    assert answers([-doubt for doubt in range(10)], wrong).auroc()[0].value == 0


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Doubts of two normal distributions one apart, whose AUROC is Φ(1/√2) = 0.7602."""
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        wrong = rng.random(150) < 0.4
        interval = answers(rng.normal(size=150) + wrong, wrong, seed=seed).auroc()[0]
        held += interval.low <= 0.7602 <= interval.high
    assert held >= 51  # 57 are expected; fewer than 51 in one of a thousand


def test_answers_to_one_item_count_as_one():
    """The same answer ten times over tells no more than once, and the interval knows."""
    rng = np.random.default_rng(0)
    doubts, wrong = rng.normal(size=40), rng.random(40) < 0.5
    once = answers(doubts, wrong, resamples=1000).auroc()[0]
    items = np.repeat(np.arange(40), 10)
    tenfold = answers(np.repeat(doubts, 10), np.repeat(wrong, 10), items, resamples=1000).auroc()[0]
    as_others = answers(np.repeat(doubts, 10), np.repeat(wrong, 10), resamples=1000).auroc()[0]
    assert (tenfold.value, tenfold.low, tenfold.high) == pytest.approx((once.value, once.low, once.high))
    assert as_others.high - as_others.low < 0.5 * (once.high - once.low)


def test_the_same_seed_gives_the_same_and_other_scores_the_same_resamples():
    rng = np.random.default_rng(1)
    doubts, wrong = rng.normal(size=50), rng.random(50) < 0.5
    first, again = answers(doubts, wrong).auroc(), answers(doubts, wrong).auroc()
    assert first[0] == again[0]
    turned = answers(-doubts, wrong).auroc()[1]
    assert first[1] + turned == pytest.approx(np.ones(200)), "resample by resample the two add up to 1"
    assert answers(doubts, wrong, seed=1).auroc()[0] != first[0]


def test_risk_at_a_coverage_is_that_of_the_surest():
    wrong = [False, False, True, False, True, True, False, True, True, True]
    risks = dict(zip(COVERAGES, answers(range(10), wrong).risks(), strict=True))
    for given_answers in range(1, 11):
        expected = np.mean(wrong[:given_answers])
        assert risks[given_answers / 10].value == pytest.approx(expected)
    assert risks[0.25].value == pytest.approx(1 / 3), "at least so many are given"
    assert all(risk.low <= risk.value <= risk.high for risk in risks.values())


def test_equal_doubts_are_given_together():
    tied = answers([1, 1, 1, 1, 2], [True, False, False, False, True])
    assert dict(zip(COVERAGES, tied.risks(), strict=True))[0.1].value == 0.25
    chosen = tied.threshold(coverage=0.2)
    assert (chosen.doubt, chosen.coverage, chosen.accuracy) == (1, 0.8, 0.75)


def test_the_area_is_the_mean_risk():
    wrong = [False, True, False, True]
    expected = np.mean([np.mean(wrong[: last + 1]) for last in range(4)])
    assert answers(range(4), wrong).area().value == pytest.approx(expected)


def test_a_threshold_gives_the_most_at_an_accuracy():
    wrong = [False, True, False, False, False, True, True]
    chosen = answers(range(7), wrong).threshold(accuracy=0.8)
    assert (chosen.doubt, chosen.accuracy, chosen.coverage) == (4, 0.8, pytest.approx(5 / 7))
    everything = answers(range(7), wrong).threshold(accuracy=0.5)
    assert everything.coverage == 1
    with pytest.raises(ConfigError, match=r"no threshold reaches an accuracy of 0\.9: the surest answers have 0\.5 at best"):
        answers([1, 1], [True, False]).threshold(accuracy=0.9)


def test_held_out_figures_do_not_flatter():
    """Doubts that tell nothing reach an accuracy on the answers that chose the threshold, and not on others."""
    gaps = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        doubts, wrong = rng.normal(size=60), rng.random(60) < 0.5
        doubts[0], wrong[0] = -10, False  # so that the accuracy is reached
        chosen = answers(doubts, wrong, seed=seed).threshold(accuracy=0.6)
        gaps.append(chosen.accuracy - chosen.held_out_accuracy.value)
    assert np.mean(gaps) > 0.03
