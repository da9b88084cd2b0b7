"""An answer's scores: what each is, computed literally, in whatever parts the records come; and what is made of the table."""

import json
import math
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner

from tests.support.traces import entry
from vllm_entropix.cli.main import app
from vllm_entropix.records.choice import choice_json, choice_values
from vllm_entropix.records.fields import column, names
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.records.schema import ChoiceTrace
from vllm_entropix.records.scores import BY_NAME, CONTROL, SCORES, Abstention, AnswerScores, Tally, scores_of_entries
from vllm_entropix.records.trace import TokenTrace

DOCS = Path(__file__).resolve().parents[2] / "docs"
FIELDS = len(names())


def records(tokens, **columns):
    """Packed records with these columns; all others are null, and nothing is forced."""
    values = np.full((tokens, FIELDS), np.nan, dtype="<f4")
    values[:, column("forced")] = 0
    for name, of in columns.items():
        values[:, column(name)] = of
    return values


def scored(values, abstention=None):
    tally = Tally()
    tally.add_values(values)
    return tally.values(abstention)


def literal(values):
    """Every score by its definition, one token at a time."""
    forced = values[:, column("forced")]
    tokens = [row for row, is_forced in zip(values.astype(float), forced, strict=True) if not is_forced > 0]

    def known(name):
        return [row[column(name)] for row in tokens if math.isfinite(row[column(name)])]

    def mean(of):
        return math.fsum(of) / len(of) if of else None

    regimes = known("regime")
    first = tokens[0][column("entropy")] if tokens else math.nan
    negative = mean([-value for value in known("logprob")])
    found = {
        "tokens": len(tokens),
        "abstained": None,
        "entropy_mean": mean(known("entropy")),
        "entropy_max": max(known("entropy"), default=None),
        "entropy_first": first if math.isfinite(first) else None,
        "varentropy_mean": mean(known("varentropy")),
        "perplexity": None if negative is None or negative > 88 else math.exp(negative),
        "margin_min": min(known("margin"), default=None),
        "attention_entropy_mean": mean(known("attention_entropy")),
    }
    for number, regime in enumerate(REGIMES):
        found[f"share_{regime.lower()}"] = regimes.count(number) / len(regimes) if regimes else None
    return found


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, float):
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
        else:
            assert found[name] == value, name


NUMBERS = st.floats(0, 8, width=32) | st.sampled_from([np.nan, np.inf])


@given(
    arrays(np.float32, (7, FIELDS), elements=NUMBERS, fill=st.nothing()),
    st.lists(st.integers(0, 6), max_size=3),
    st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_each_score_is_its_definition_in_whatever_parts_records_come(values, cuts, forced):
    values = values.copy()
    values[:, column("logprob")] *= -1
    values[:, column("regime")] = np.floor(values[:, column("regime")] / 2)
    values[:, column("forced")] = forced
    expected = literal(values)
    close(scored(values), expected)
    with mock.patch("vllm_entropix.records.scores._FOLDED", 1):
        tally = Tally()
        for part in np.split(values, sorted(cuts)):
            tally.add(part.astype("<f4").tobytes(), 4 * FIELDS)
        close(tally.values(), expected)


def test_a_long_answer_takes_little_memory_and_has_the_same_scores():
    rng = np.random.default_rng(0)
    values = records(5000, entropy=rng.exponential(size=5000), logprob=-rng.exponential(size=5000))
    tally = Tally()
    for row in values:
        tally.add(row.tobytes() + bytes(8), 4 * FIELDS + 8)  # with an alternative, which doesn't matter
        assert len(tally._waiting) <= 256 * (4 * FIELDS + 8)
    close(tally.values(), literal(values))


def test_what_no_token_tells_is_null():
    assert set(scored(records(3)).values()) == {3, None}
    nothing = Tally().values()
    assert nothing["tokens"] == 0
    assert {value for name, value in nothing.items() if name != "tokens"} == {None}
    # A first token without an entropy isn't replaced by the second.
    values = scored(records(2, entropy=[np.nan, 2]))
    assert (values["entropy_first"], values["entropy_mean"]) == (None, 2)


def test_a_perplexity_beyond_all_numbers_is_null():
    assert scored(records(2, logprob=-200))["perplexity"] is None
    assert scored(records(2, logprob=-80))["perplexity"] == pytest.approx(math.exp(80))


def test_forced_tokens_are_not_the_models():
    values = records(3, entropy=[5, 1, 3], forced=[1, 0, 0], logprob=[-30, -1, -1], regime=[1, 0, 0], margin=[0, 0.5, 0.75])
    found = scored(values)
    assert (found["tokens"], found["entropy_first"], found["entropy_max"], found["entropy_mean"]) == (2, 1, 3, 2)
    assert (found["share_helv"], found["margin_min"]) == (0, 0.5)
    assert found["perplexity"] == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("bounds", "abstained"),
    [((1.0, None), True), ((2.0, None), False), ((None, 2.0), False), ((None, 2.5), True), ((3.0, 2.5), True)],
)
def test_abstention_is_strict(bounds, abstained):
    values = records(2, entropy=[1, 3])
    assert scored(values, Abstention("entropy_mean", *bounds))["abstained"] is abstained
    assert scored(values, Abstention("perplexity", *bounds))["abstained"] is False, "a score that is null doesn't abstain"


def test_scores_of_entries_are_those_of_their_records():
    entries = [entry(1, 0.5, 0.25), entry(2, 2.0, 7.0), entry(3, None, None), entry(4, 6.0, 9.0, forced=True)]
    found = scores_of_entries(entries)
    assert (found.tokens, found.entropy_mean, found.entropy_max, found.perplexity) == (3, 1.25, 2.0, None)
    shares = [getattr(found, f"share_{regime.lower()}") for regime in REGIMES]
    assert sum(shares) == pytest.approx(1)
    values = records(2, entropy=[1, 2], logprob=[-1, -2], regime=[0, 4])
    trace = TokenTrace()
    trace.extend(values.tobytes(), 2)
    assert scores_of_entries(trace).model_dump() == scored(values)


def test_a_choice_tells_them():
    values = scored(records(2, entropy=[1, 2]), Abstention("entropy_mean", 1))
    told = json.loads(b"".join(choice_json([], TokenTrace(), None, values, "dry;min_p")))
    assert told == choice_values([], TokenTrace(), None, values, "dry;min_p")
    read = ChoiceTrace.model_validate(told)
    assert (read.tokens, read.scores.entropy_mean, read.scores.abstained, read.sampler) == ([], 1.5, True, "dry;min_p")
    assert read.model_dump(mode="json") == told
    assert pickle.loads(pickle.dumps(read.scores)) == read.scores


def test_the_table_is_whole():
    assert tuple(AnswerScores.model_fields) == ("tokens", "abstained", *BY_NAME)
    assert len(BY_NAME) == len(SCORES)
    assert CONTROL in BY_NAME
    for score in SCORES:
        assert AnswerScores.model_fields[score.name].description == score.described
        assert list(score.buckets) == sorted(set(score.buckets))
        assert score.of in names()
        assert (score.category is not None) == (score.statistic == "share")


def test_the_documented_table_is_up_to_date():
    """After a change: put what `vllm-entropix scores --markdown` prints between the comments."""
    text = (DOCS / "scoring-answers.md").read_text()
    table = text.split("<!-- made by `vllm-entropix scores --markdown` -->\n")[1].split("\n<!-- end -->")[0]
    assert table == CliRunner().invoke(app, ["scores", "--markdown"]).output.strip()
