"""Choosers: what ships, and what other packages register."""

import math
from importlib.metadata import EntryPoint

import pytest

from vllm_entropix.forks import choice
from vllm_entropix.forks.choice import Contender, chooser, scores_of
from vllm_entropix.settings.errors import ConfigError


def contender(branch, *, logprobs=(), entropies=(), margins=(), text=""):
    count = max(map(len, (logprobs, entropies, margins)))
    return Contender(branch, [0] * count, 0, count, logprobs, entropies, margins, True, lambda: text)


def test_confidence_is_the_mean_log_probability():
    scores = scores_of(
        chooser("confidence"),
        [
            contender(0, logprobs=(-1.0, -2.0, None)),
            contender(1, logprobs=(-0.5, -math.inf)),
            contender(2, logprobs=(None,)),
        ],
    )
    assert scores == [-1.5, -math.inf, -math.inf]


def test_entropy_prefers_the_least_and_what_isnt_known_loses():
    scores = scores_of(chooser("entropy"), [contender(0, entropies=(1.0, 2.0)), contender(1, entropies=(None,))])
    assert scores == [-1.5, -math.inf]


def test_margin_is_the_mean_lead():
    assert scores_of(chooser("margin"), [contender(0, margins=(0.5, None, 1.0))]) == [0.75]


def test_an_unknown_chooser_is_refused():
    with pytest.raises(ConfigError, match="there is no chooser 'best'; there are confidence, entropy, margin"):
        chooser("best")


def test_a_chooser_gives_a_score_for_each():
    with pytest.raises(ValueError, match="a chooser gave 1 scores for 2 branches"):
        scores_of(lambda contenders: [0.0], [contender(0), contender(1)])


def by_text(contenders):
    return [len(one.text()) for one in contenders]


@pytest.fixture
def others(monkeypatch):
    """Entry points, as if packages had registered them."""
    found = [
        EntryPoint("longest", f"{__name__}:by_text", choice.GROUP),
        EntryPoint("gone", "no_such_package:chooser", choice.GROUP),
        EntryPoint("number", "math:pi", choice.GROUP),
        EntryPoint("margin", f"{__name__}:by_text", choice.GROUP),
    ]
    monkeypatch.setattr(choice, "entry_points", lambda group: found if group == choice.GROUP else [])
    choice._of_others.cache_clear()
    yield
    choice._of_others.cache_clear()


def test_other_packages_register_choosers(others):
    assert scores_of(chooser("longest"), [contender(0, text="a"), contender(1, text="abc")]) == [1.0, 3.0]
    assert chooser("margin") is choice.margin  # ours stays ours
    with pytest.raises(ConfigError, match=r"the chooser gone of the package .* can't be used: No module named"):
        chooser("gone")
    with pytest.raises(ConfigError, match=r"the chooser number .* is no function"):
        chooser("number")
    with pytest.raises(ConfigError, match="there are confidence, entropy, margin, gone, longest, number"):
        chooser("best")
