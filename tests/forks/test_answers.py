"""Answers in texts: each rule, what it leaves out, and a function of one's own."""

import time

import pytest

from vllm_entropix.forks import answers
from vllm_entropix.forks.answers import normalised, register, rule_of
from vllm_entropix.settings.errors import ConfigError


def found(rule, text):
    span = rule_of(rule)(text)
    return None if span is None else text[slice(*span)]


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        ("last-number", "3 + 4 = 7.\n", "7"),
        ("last-number", "it is -1,234.50 then", "-1,234.50"),
        ("last-number", "12-5", "5"),
        ("last-number", "none at all", None),
        ("boxed", r"so \boxed{1} and \boxed{\frac{1}{2}} end", r"\frac{1}{2}"),
        ("boxed", r"\boxed{ open", None),
        ("boxed", r"\boxed{ }", None),
        ("last-line", "a\n b c \n\n", "b c"),
        ("last-line", " \n", None),
        ("after:####", "#### 5\nthen #### 7 apples\nend", "7 apples"),
        ("after:answer is", "no mark", None),
        ("after:answer is", "the answer is", None),
    ],
)
def test_where_an_answer_stands(rule, text, answer):
    assert found(rule, text) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [("**18.00**", "18"), (" Yes. ", "yes"), ("1,234", "1234"), ("$5", "5.0"), ("a  b", "A b"), ("-0.50", "-0.5")],
)
def test_answers_that_are_the_same(one, other):
    assert normalised(one) == normalised(other)


def test_answers_that_are_not_the_same():
    assert len({normalised(text) for text in ("1", "-1", "10", "1e1", "one", "1" * 50, "1" * 51)}) == 7


@pytest.mark.parametrize("rule", ["last-number", "boxed", "last-line", "after:x"])
def test_long_texts_take_no_long_time(rule):
    for part in ("1", "1,", "\\boxed{", "x", "\n", " ", "-"):
        begin = time.perf_counter()
        rule_of(rule)(part * 20_000)
        assert time.perf_counter() - begin < 1


def test_a_rule_of_ones_own(monkeypatch):
    monkeypatch.setattr(answers, "RULES", dict(answers.RULES))
    register("first-word", lambda text: (text.split() or [None])[0])
    assert found("first-word", "yes it is yes") == "yes"
    assert rule_of("first-word")("") is None
    register("made-up", lambda text: "not there")
    assert rule_of("made-up")("text") is None
    for taken in ("boxed", "after:x", ""):
        with pytest.raises(ConfigError, match="give yours another"):
            register(taken, lambda text: text)


def test_an_unknown_rule_is_refused():
    for name in ("best", "after:"):
        with pytest.raises(
            ConfigError, match=f"no rule '{name}' for answers; there are last-number, boxed, last-line, and after:TEXT"
        ):
            rule_of(name)
