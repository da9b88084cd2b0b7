"""Where branches part: thresholds, distance, words, and which alternatives are followed."""

import pytest

from tests.forks.toy import record
from vllm_entropix.forks.policy import alternatives, coin, is_fork
from vllm_entropix.settings.server import Forks

TORN = ((7, 0.4), (8, 0.35), (9, 0.15), (10, 0.04))


@pytest.mark.parametrize(
    ("settings", "values", "forks"),
    [
        ({}, {"regime": "LEHV"}, True),
        ({}, {"regime": "HELV"}, False),
        ({}, {"regime": None}, False),
        ({"entropy": 1.5}, {"regime": "LELV", "entropy": 1.5}, True),
        ({"entropy": 1.5}, {"regime": "LEHV", "entropy": 1.49}, False),
        ({"entropy": 0}, {"entropy": 0.0}, True),
        ({"entropy": 0}, {"entropy": None}, False),
        ({"margin": 0.06}, {"regime": "LEHV"}, True),
        ({"margin": 0.04}, {"regime": "LEHV"}, False),
        ({}, {"regime": "LEHV", "forced": True}, False),
        ({"place": "random"}, {"regime": None, "entropy": None}, True),
        ({"place": "random"}, {"forced": True}, False),
        ({"place": "sure"}, {"regime": "LELV"}, True),
        ({"place": "sure"}, {"regime": "LEHV"}, False),
        ({"place": "sure", "entropy": 1.5}, {"entropy": 1.49}, True),
        ({"place": "sure", "entropy": 1.5}, {"entropy": 1.5}, False),
        ({"place": "sure", "entropy": 1.5}, {"entropy": None}, False),
    ],
)
def test_a_fork_is_where_the_model_is_torn(settings, values, forks):
    assert is_fork(Forks(**settings), record(TORN, **values)) is forks


def test_a_margin_that_isnt_known_is_the_largest():
    assert not is_fork(Forks(entropy=0, margin=0.5), record([(7, 0.1)]))
    assert is_fork(Forks(entropy=0), record([(7, 0.1)]))


@pytest.mark.parametrize(
    ("settings", "token", "expected"),
    [
        ({"width": 2}, 7, [(8, 0.35)]),
        ({"width": 2}, 8, [(7, 0.4)]),
        ({"width": 4}, 9, [(7, 0.4), (8, 0.35)]),  # the floor leaves the last out
        ({"width": 4, "floor": 0}, 9, [(7, 0.4), (8, 0.35), (10, 0.04)]),
        ({"width": 3}, 99, [(7, 0.4), (8, 0.35)]),  # a rare token was drawn
        ({"width": 1}, 7, []),
        ({"width": 3, "floor": 0.5}, 7, []),
    ],
)
def test_alternatives_are_followed_in_their_order_down_to_the_floor(settings, token, expected):
    assert alternatives(Forks(entropy=0, **settings), record(TORN), token, None) == expected


def test_what_cant_be_drawn_is_no_alternative():
    masked = record([(7, 1.0), (8, 0.0)])
    assert alternatives(Forks(entropy=0, floor=0), masked, 7, None) == []
    unknown = record([(7, 0.9)], entropy=1.0)
    object.__setattr__(unknown, "_values", {**unknown._values, "alternatives": ((7, 0.9), (8, None))})
    assert alternatives(Forks(entropy=0, floor=0), unknown, 7, None) == []


def test_no_branch_parts_inside_a_word():
    within = {(1, 7)}

    def continues_word(before, token):
        return (before, token) in within

    torn, settings = record(TORN), Forks(entropy=0)
    assert alternatives(settings, torn, 7, 1, continues_word) == []
    assert alternatives(settings, torn, 7, 2, continues_word) == [(8, 0.35)]
    assert alternatives(Forks(entropy=0, inside_words=True), torn, 7, 1, continues_word) == [(8, 0.35)]


def test_a_coin_is_fair_and_a_seed_and_a_place_have_one():
    tossed = [coin(seed, position) for seed in range(50) for position in range(40)]
    assert tossed == [coin(seed, position) for seed in range(50) for position in range(40)]
    assert len(set(tossed)) == len(tossed)
    assert min(tossed) >= 0
    assert max(tossed) < 1
    assert abs(sum(one < 0.3 for one in tossed) / len(tossed) - 0.3) < 0.04  # four standard deviations
    assert coin(None, 3) != coin(None, 3)
