"""`vllm-entropix scores`: traces and labels in, figures and a threshold out; and what is wrong with either, in one sentence."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.traces import line, written
from vllm_entropix.cli.main import app
from vllm_entropix.observability.evaluation import Labelled, evaluate
from vllm_entropix.observability.labels import read_labels
from vllm_entropix.records.scores import CONTROL
from vllm_entropix.settings.errors import ConfigError


def answer(name, entropy, logprob=None, prompt=(1, 2, 3), index=0):
    """An answer of two tokens with this mean entropy."""
    made = line(["a", "b"], name=name, index=index, prompt=prompt, metrics=[(entropy - 0.25, 0.5), (entropy + 0.25, 0.5)])
    told = {"logprob": -entropy if logprob is None else logprob, "margin": 1 / (1 + entropy)}
    made.records = [record.model_copy(update=told) for record in made.records]
    return made


@pytest.fixture
def files(tmp_path):
    """60 answers to 20 items of two tasks: wrong ones are less sure by entropy, and log-probabilities tell nothing."""
    rng = np.random.default_rng(0)
    lines, rows = [], ["request_id,index,correct,item,task"]
    for number in range(60):
        wrong = rng.random() < 0.4
        entropy = 1 + rng.random() + 0.6 * wrong
        lines.append(answer(f"r{number // 3}", entropy, -rng.random(), index=number % 3))
        rows.append(f"r{number // 3},{number % 3},{int(not wrong)},q{number // 3},{'sums' if number < 30 else 'facts'}")
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(rows) + "\n")
    return written(tmp_path / "traces.jsonl", *lines), labels


def run(*arguments):
    return CliRunner().invoke(app, ["scores", *map(str, arguments), "--resamples", "200"])


def told(*arguments):
    ended = run(*arguments, "--json")
    assert ended.exit_code == 0, ended.output
    return json.loads(ended.stdout, parse_constant=pytest.fail)


def test_the_better_score_is_found_and_said_to_beat_log_probabilities(files):
    traces, labels = files
    found = told(traces, "--labels", labels)
    assert (found["answers"], found["items"], found["without_label"], found["without_trace"]) == (60, 20, 0, 0)
    by_name = {one["score"]: one for one in found["scores"]}
    best, control = by_name["entropy_mean"], by_name[CONTROL]
    assert best["auroc"]["low"] > 0.75
    assert control["auroc"]["low"] < 0.5 < control["auroc"]["high"]
    assert best["auroc_over_log_probabilities"]["low"] > 0
    assert control["auroc_over_log_probabilities"] is None
    # The margin is the entropy's opposite here, and speaks against an answer where it is low.
    assert by_name["margin_min"]["auroc"]["value"] == pytest.approx(best["auroc"]["value"])
    assert [one["auroc"]["value"] for one in found["scores"]] == sorted(
        (one["auroc"]["value"] for one in found["scores"]), reverse=True
    )
    curve = best["risk_at_coverage"]
    assert curve[-1]["coverage"] == 1
    assert curve[-1]["value"] == pytest.approx(found["wrong"] / 60)
    assert curve[4]["value"] < curve[-1]["value"]
    assert best["threshold"] is None
    assert found == told(traces, "--labels", labels), "the seed decides"


def test_a_threshold_says_what_a_request_abstains_by(files):
    traces, labels = files
    by_name = {one["score"]: one for one in told(traces, "--labels", labels, "--accuracy", 0.9)["scores"]}
    threshold = by_name["entropy_mean"]["threshold"]
    assert threshold["accuracy"] >= 0.9
    assert 1 < threshold["entropix_abstain_above"] < 2.6
    assert threshold["held_out_coverage"]["low"] <= threshold["held_out_coverage"]["value"]
    assert 0 < by_name["margin_min"]["threshold"]["entropix_abstain_below"] < 1
    covered = told(traces, "--labels", labels, "--coverage", 0.5)["scores"][0]["threshold"]
    assert covered["coverage"] == pytest.approx(0.5)
    shown = run(traces, "--labels", labels, "--coverage", 0.5)
    assert shown.exit_code == 0
    asks = json.loads(shown.stdout.strip().splitlines()[-1])
    assert asks["vllm_xargs"].keys() <= {"entropix_abstain_score", "entropix_abstain_above", "entropix_abstain_below"}


def test_tasks_are_told_apart(files):
    traces, labels = files
    found = told(traces, "--labels", labels, "--by", "task")
    assert {name: {one["answers"] for one in of} for name, of in found["groups"].items()} == {"facts": {30}, "sums": {30}}
    shown = run(traces, "--labels", labels, "--by", "task")
    assert [title in shown.stdout for title in ("All answers", "task facts", "task sums")] == [True] * 3


def test_answers_to_one_prompt_are_one_item_unless_labels_say_otherwise(tmp_path):
    lines = [answer("a", 1), answer("b", 2), answer("c", 3, prompt=(9,))]
    path = tmp_path / "labels.csv"
    path.write_text("request_id,correct\na,1\nb,0\nc,yes\n")
    joined = Labelled.join(lines, read_labels(path))
    assert joined.items[0] == joined.items[1] != joined.items[2]
    assert joined.wrong == [False, True, False]


def test_a_score_that_is_null_of_some_answers_is_judged_on_the_others():
    lines = [answer(str(number), 1 + number) for number in range(6)]
    for made in lines[:2]:
        made.records = [record.model_copy(update={"logprob": None}) for record in made.records]
    labels = {(str(number), 0): label for number, label in enumerate(map(_label, [0, 1, 0, 1, 0, 1]))}
    found = {one.score: one for one in evaluate(Labelled.join(lines, labels), 100, 0)}
    assert (found[CONTROL].answers, found["entropy_mean"].answers) == (4, 6)
    assert found["entropy_mean"].over_control is None, "they aren't known of the same answers"


def _label(wrong):
    from vllm_entropix.observability.labels import Label

    return Label(bool(wrong))


def test_what_is_left_out_is_told(files, tmp_path):
    traces, labels = files
    rows = labels.read_text().splitlines()
    labels.write_text(
        "\n".join([*rows[:41], "r0x,0,1,q,sums", *(f"{row.split(',')[0]},{row.split(',')[1]},,," for row in rows[41:])])
    )
    found = told(traces, "--labels", labels)
    assert (found["answers"], found["without_label"], found["without_trace"]) == (40, 20, 1)
    shown = run(traces, "--labels", labels).stdout
    assert "Traces without a label: 20. Labels without a trace: 1." in " ".join(shown.split())


WRONG_LABELS = [
    ("name,correct\na,1\n", "has no column 'request_id'; its first line names 'name, correct'"),
    ("request_id,right\na,1\n", "has no column 'correct'"),
    ("", "has no column 'request_id'"),
    ("request_id,correct\nr0,maybe\n", "line 2: correct is 'maybe', but it should be 1 or 0"),
    ("request_id,index,correct\nr0,-1,1\n", "line 2: index is '-1', but it should be the number of an answer"),
    ("request_id,correct\nr0,1\nr0,0\n", "line 3: 'r0' index 0 is labelled twice"),
    ("request_id,correct\n,1\n", "line 2: request_id is empty"),
    ("request_id,correct\nr0,\n", "labels no answer"),
    ("request_id,correct\nother,1\n", "no answer has both a trace and a label"),
    ("request_id,correct\nr0,1\nr1,1\n", "all 2 labelled answers are right"),
    ("request_id,correct\nr0,0\nr1,0\n", "all 2 labelled answers are wrong"),
]


@pytest.mark.parametrize(("text", "problem"), WRONG_LABELS)
def test_wrong_labels_are_refused_in_one_sentence(files, text, problem):
    traces, labels = files
    labels.write_text(text)
    refused = run(traces, "--labels", labels).exception
    assert isinstance(refused, ConfigError)
    assert problem in str(refused)
    assert "\n" not in str(refused)


def test_wrong_options_are_refused(files, tmp_path):
    traces, labels = files
    for arguments, problem in (
        ([traces], "--labels"),
        ([traces, "--labels", tmp_path / "nowhere.csv"], "No such file"),
        ([traces, "--labels", tmp_path], "Is a directory"),
        ([traces, "--labels", labels, "--by", "level"], "has no column 'level'"),
        ([traces, "--labels", labels, "--accuracy", "0.9", "--coverage", "0.5"], "give one of them"),
        ([traces, traces, "--labels", labels], "twice"),
    ):
        assert problem in str(run(*arguments).exception), arguments
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    assert "can't read" in str(run(traces, "--labels", binary).exception)


def test_a_target_that_no_score_reaches_is_said_to_be_none(tmp_path):
    traces = written(tmp_path / "traces.jsonl", *(answer(name, 1.0) for name in "abcd"))
    labels = tmp_path / "labels.csv"
    labels.write_text("request_id,correct,item\na,1,1\nb,0,2\nc,1,3\nd,0,4\n")
    refused = run(traces, "--labels", labels, "--accuracy", "0.9").exception
    assert str(refused) == "no score's threshold reaches an accuracy of 0.9"
    assert run(traces, "--labels", labels, "--accuracy", "0.5").exit_code == 0
