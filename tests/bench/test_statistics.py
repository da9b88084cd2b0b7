"""Statistics of a study, against scipy, values of other programs, and cases worked by hand."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from vllm_entropix.bench.statistics import (
    distinct,
    distinct_ngrams,
    expected_best,
    holm,
    majority,
    mcnemar,
    mean,
    pass_at,
    sign_flip,
)


def test_the_mean_over_tasks_counts_tasks_alike():
    found = mean([np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0])], 2000, 1)
    assert found.value == pytest.approx((0.75 + 0.5) / 2)
    assert found.low < found.value < found.high


def test_the_interval_is_that_of_the_normal_for_many_items():
    values = np.random.default_rng(3).normal(0.2, 1.0, 800)
    found = mean([values], 4000, 1)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_items_are_drawn_within_their_task():
    # All of one task are right and all of the other wrong: however items are drawn, the mean of the means is a half.
    found = mean([np.ones(5), np.zeros(50)], 500, 1)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_an_interval_keeps_what_it_promises():
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(200):
        found = mean([rng.binomial(1, 0.3, 60).astype(float), rng.binomial(1, 0.7, 60).astype(float)], 300, study)
        covered += found.low <= 0.5 <= found.high
    assert 0.9 <= covered / 200 <= 0.99


def test_signs_are_flipped_exactly_where_there_are_few():
    # 1 of 8 ways is as high, 1 as low: the sum of all three.
    assert sign_flip([np.array([1.0, 2.0, 3.0])], 10_000, 0) == pytest.approx(2 / 8)
    assert sign_flip([np.array([0.0, 0.0])], 10_000, 0) == 1.0
    assert sign_flip([np.array([0.0, 0.5]), np.array([0.0])], 10_000, 0) == 1.0
    # |1 - 1| is the least there is.
    assert sign_flip([np.array([1.0, -1.0])], 10_000, 0) == 1.0


def test_flipped_signs_agree_with_the_t_test_for_many_items():
    values = np.random.default_rng(5).normal(0.1, 1.0, 300)
    assert sign_flip([values], 20_000, 0) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.01)


def test_no_difference_is_rarely_found_where_there_is_none():
    rng = np.random.default_rng(1)
    found = sum(sign_flip([rng.integers(-1, 2, 40) / 5], 500, study) < 0.05 for study in range(200))
    assert found <= 20


def test_mcnemar_is_exact():
    # R: binom.test(9, 10)$p.value is 0.02148437; mcnemar_exact of 9 and 1.
    first = [True] * 9 + [False] + [True] * 20
    second = [False] * 9 + [True] + [True] * 20
    found = mcnemar(first, second)
    assert (found.first, found.second) == (9, 1)
    assert found.p == pytest.approx(0.02148437, abs=1e-7)
    assert mcnemar([True], [True]).p == 1.0


def test_holm_by_hand():
    # Sorted: 0.01·4, 0.02·3, 0.03·2, 0.04·1, each at least the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_expected_best_is_the_mean_over_all_choices():
    scores = [0.3, 0.1, 0.4, 0.15, 0.92]
    for k, found in enumerate(expected_best(scores), 1):
        assert found == pytest.approx(np.mean([max(chosen) for chosen in combinations(scores, k)]))


def test_pass_at_k_is_the_mean_over_all_choices():
    draws = [True, False, False, True, False]
    for k in range(1, 6):
        assert pass_at(k, 2, 5) == pytest.approx(np.mean([any(chosen) for chosen in combinations(draws, k)]))
    with pytest.raises(ValueError, match="needs 6 draws"):
        pass_at(6, 2, 5)


def test_the_majority_votes_by_answers():
    assert majority(["3", "3", "4"], [True, True, False]) == 1.0
    assert majority(["3", "4", "4"], [True, False, False]) == 0.0
    assert majority(["3", "4"], [True, False]) == 0.5  # either is chosen
    assert majority([None, None, "3"], [False, False, True]) == 1.0  # nothing is no vote
    assert majority([None], [False]) == 0.0


def test_distinct_counts():
    assert distinct(["a", "b", "a"]) == 2
    assert distinct_ngrams(["a b c d e", "a b c d e"]) == 0.5
    assert distinct_ngrams(["a b c d", "e f g h"]) == 1.0
    assert math.isnan(distinct_ngrams(["too short"]))
