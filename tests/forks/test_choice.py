"""Choosers: what ships, and what other packages register."""

import math
from importlib.metadata import EntryPoint

import pytest

from vllm_entropix.forks import choice
from vllm_entropix.forks.answers import last_number
from vllm_entropix.forks.choice import Contender, chooser, scores_of
from vllm_entropix.settings.errors import ConfigError


def contender(branch, *, logprobs=(), entropies=(), margins=(), text="", pieces=(), start=0, rule=None):
    count = max(map(len, (logprobs, entropies, margins)))
    values = [0] * (start + count), start, start + count, logprobs, entropies, margins
    return Contender(branch, *values, True, lambda: text or "".join(pieces), lambda: pieces, rule)


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


def test_margin_is_that_of_the_answers_tokens_where_a_rule_finds_some():
    pieces = ("I", " say", " 1", "2", ".", " Yes")
    sure = contender(0, margins=(0.9, 0.2, 0.4, 0.9), pieces=pieces, start=2, rule=last_number)
    none = contender(1, margins=(1.0, 1.0), pieces=("no", " number"), rule=last_number)
    assert sure.of_answer == [0, 1]
    assert none.of_answer == []
    assert scores_of(choice.margin, [sure, none]) == [pytest.approx(0.55), -math.inf]
    # Where none has an answer, of all tokens.
    assert scores_of(choice.margin, [none, contender(2, margins=(0.5,))]) == [1.0, 0.5]


def test_the_majority_wins_and_in_it_the_most_confident():
    told = [("It is 7.", -3.0), ("7.0", -0.1), ("so 8", -0.05), ("none", -0.01)]
    given = [contender(number, logprobs=(value,), text=text, rule=last_number) for number, (text, value) in enumerate(told)]
    votes = scores_of(chooser("vote"), given)
    assert votes == pytest.approx([2 + math.exp(-3.0) / 2, 2 + math.exp(-0.1) / 2, 1 + math.exp(-0.05) / 2, -math.inf])
    # One sure branch outweighs two that are not.
    doubtful = [("7", -3.0), ("7", -2.0), ("8", -0.05)]
    given = [contender(number, logprobs=(value,), text=text, rule=last_number) for number, (text, value) in enumerate(doubtful)]
    assert max(range(3), key=scores_of(chooser("vote"), given).__getitem__) == 1
    assert max(range(3), key=scores_of(chooser("weighted-vote"), given).__getitem__) == 2


def test_without_any_answer_the_most_confident_wins():
    given = [contender(0, logprobs=(-2.0,), text="a", rule=last_number), contender(1, logprobs=(-1.0,), text="b")]
    assert scores_of(chooser("vote"), given) == [-2.0, -1.0]


def test_an_unknown_chooser_is_refused():
    with pytest.raises(
        ConfigError, match="there is no chooser 'best'; there are confidence, entropy, margin, vote, weighted-vote, all"
    ):
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
    with pytest.raises(ConfigError, match="weighted-vote, all, gone, longest, number"):
        chooser("best")
