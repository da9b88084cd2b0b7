"""The report of a study: figures worked by hand, the page in a real browser, texts that are no markup."""

import json
import math

import pytest
from typer.testing import CliRunner

from tests.support.browser import chromium, opened
from vllm_entropix.bench.answers import Answer, Store
from vllm_entropix.bench.report import FIGURES, PAGE, TABLES, markdown
from vllm_entropix.bench.signals import ALL
from vllm_entropix.bench.study import Study
from vllm_entropix.bench.summary import EQUAL_TOKENS, summarise
from vllm_entropix.cli.main import app
from vllm_entropix.settings.errors import ConfigError

NAME = "A <script>alert(1)</script> & study"


def study():
    return Study.model_validate(
        {
            "name": NAME,
            "resamples": 400,
            "configurations": 2,
            "models": {"m": {"endpoint": "http://127.0.0.1:1/v1"}},
            "tasks": {
                "sums": {"kind": "arithmetic", "tuning": 2, "test": 20},
                "capitals": {"kind": "capitals", "tuning": 0, "test": 10},
                "open": {"kind": "open_prompts", "tuning": 0, "test": 1},
            },
            "samplers": {
                "greedy": {"fixed": {"temperature": 0}},
                "warm": {"ranges": {"temperature": [0.5, 1]}},
                "copy": {"fixed": {"temperature": 0.1}},
            },
        }
    )


def answer(sampler, task, item, draw, correct, text, phase="test", configuration=0, **more):
    return Answer(
        model="m", phase=phase, sampler=sampler, configuration=configuration, task=task, item=str(item), draw=draw, seed=0,
        parameters={"temperature": 0.5}, text=text, finish_reason="length" if draw == 4 else "stop", tokens=10,
        answer=None if correct is None else text, correct=correct, seconds=1.0, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Greedy: 10 of 20 sums, all capitals. warm: each sum right in 1 of 5 draws, the capitals in all. copy: greedy's texts."""
    folder = tmp_path_factory.mktemp("results")
    with Store(folder, study()) as store:
        for configuration, right in enumerate([(False, False), (True, False)]):
            for item, correct in enumerate(right):
                store.add(answer("warm", "sums", item, 0, correct, "t", "tuning", configuration))
        for item in range(20):
            told = {"entropy_mean": 0.1 if item < 10 else 2.0, "margin_min": 0.9 if item < 10 else 0.1, "perplexity": 2.0}
            store.add(answer("greedy", "sums", item, 0, item < 10, f"greedy {item}", signals=told))
            for draw in range(5):
                signals = {"temperature_mean": 0.5, "share_lelv": 0.75, "share_argmax": 0.75}
                text = "right" if draw == 0 else "wrong"
                store.add(answer("warm", "sums", item, draw, draw == 0, text, signals=signals))
                store.add(answer("copy", "sums", item, draw, item < 10, f"greedy {item}"))
        for item in range(10):
            told = {"entropy_mean": 0.1, "margin_min": 0.9, "perplexity": 2.0}
            store.add(answer("greedy", "capitals", item, 0, True, "Rome", signals=told))
            for draw in range(5):
                store.add(answer("warm", "capitals", item, draw, True, "Rome"))
                store.add(answer("copy", "capitals", item, draw, True, "Rome"))
        store.add(answer("greedy", "open", 0, 0, None, "a b c d"))
        for draw in range(5):
            store.add(answer("warm", "open", 0, draw, None, f"a b c {draw}"))
            store.add(answer("copy", "open", 0, draw, None, "a b c d"))
    return folder


def test_figures_by_hand(results):
    summary = summarise(results)
    [model] = summary.models
    greedy, warm, copy = model.arms
    assert (greedy.accuracy.value, warm.accuracy.value, copy.accuracy.value) == pytest.approx((0.75, 0.6, 0.75))
    assert warm.by_task["sums"].value == pytest.approx(0.2)
    assert warm.by_task["sums"].low == pytest.approx(warm.by_task["sums"].high)  # each item has the same share
    assert (warm.pass_at, greedy.pass_at) == (1.0, 0.75)
    assert warm.majority == pytest.approx(0.5)  # four of five draws agree on what is wrong
    assert warm.distinct == pytest.approx((2 + 1) / 2)
    assert (warm.distinct_open, copy.distinct_open) == (1.0, 0.2)
    assert math.isnan(greedy.distinct_open)
    # "Rome" is greedy's answer: 50 of 155 draws.
    assert warm.as_greedy == pytest.approx(50 / 155)
    assert (copy.as_greedy, copy.imitates_greedy, warm.imitates_greedy, greedy.as_greedy) == (1.0, True, False, None)
    assert warm.cut == pytest.approx(1 / 5)
    assert model.too_hard == []


def test_comparisons_by_hand(results):
    warm, copy = summarise(results).comparisons
    assert (warm.sampler, warm.against, copy.sampler) == ("warm", "greedy", "copy")
    assert warm.difference.value == pytest.approx(-0.15)
    assert warm.difference.low < -0.15 < warm.difference.high
    # First draws of warm are all right; greedy is wrong on ten sums.
    assert (warm.mcnemar.first, warm.mcnemar.second) == (10, 0)
    assert warm.mcnemar.p == pytest.approx(2 / 2**10)
    assert warm.holm == pytest.approx(2 * warm.p)
    assert (copy.p, copy.holm, copy.difference.value) == (1.0, 1.0, 0.0)


def test_majorities_and_equal_tokens_by_hand(tmp_path):
    """Two items: one that draws get right in three of four, one in none; answers of 10 tokens. Forks: both right, for 25."""
    found = Study.model_validate(
        {
            "name": "votes",
            "resamples": 400,
            "draws": 2,
            "models": {"m": {"endpoint": "http://127.0.0.1:1/v1"}},
            "tasks": {"sums": {"kind": "arithmetic", "tuning": 0, "test": 2}},
            "samplers": {
                "one": {"fixed": {"temperature": 1}, "draws": 8},
                "three": {"majority_of": "one", "votes": 3},
                "four": {"majority_of": "one", "votes": 4},
                "forks": {"sampler": "temperature", "fixed": {"entropix_forks": 2, "entropix_fork_entropy": 1}},
            },
            "ladder": ["one", "three", "four"],
        }
    )
    # Answers of the first item, of which 7 is right; None is no vote, and of equally frequent ones the first counts.
    said = [None, None, "7", "7"], ["3", "7", "7", "3"]
    with Store(tmp_path, found) as store:
        for draw, text in enumerate([*said[0], *said[1]]):
            store.add(answer("one", "sums", 0, draw, text == "7", text or "?").model_copy(update={"answer": text}))
            if draw < 7:  # four of the second item's votes aren't all there yet
                store.add(answer("one", "sums", 1, draw, False, "3"))
        for item, draw in ((0, 0), (0, 1), (1, 0), (1, 1)):
            told = {"forks": 1.0 + item}
            store.add(answer("forks", "sums", item, draw, True, "7", signals=told).model_copy(update={"tokens": 25}))
    summary = summarise(tmp_path)
    arms = {arm.sampler: arm for arm in summary.models[0].arms}
    # - - 7 and 3 7 7 → 7 and 7; - - 7 7 and 3 7 7 3 → 7 and 3.
    assert arms["one"].accuracy.value == pytest.approx(4 / 16)
    assert arms["three"].accuracy.value == pytest.approx(2 / 4)
    assert arms["four"].accuracy.value == pytest.approx(1 / 4)
    assert (arms["one"].tokens, arms["three"].tokens, arms["four"].tokens) == (10, 30, 40)
    assert arms["three"].parameters == {"temperature": 0.5, "votes": 3}
    assert arms["forks"].signals["forks"] == 1.5
    [equal] = [one for one in summary.comparisons if one.against == EQUAL_TOKENS]
    # 25 tokens are a quarter of one draw's and three quarters of three's.
    assert equal.sampler == "forks"
    assert equal.difference.value == pytest.approx(1 - (0.25 * 4 / 16 + 0.75 * 2 / 4))
    assert equal.tokens == pytest.approx(1)
    [plain] = [one for one in summary.comparisons if (one.sampler, one.against) == ("forks", "one")]
    assert plain.tokens == pytest.approx(10 / 25)
    assert "### Answers that fork, m" in markdown(summary)


def test_tuning_by_hand(results):
    [tuned] = summarise(results).models[0].tuned
    assert tuned.accuracies == {0: 0.0, 1: 0.5}
    assert tuned.best_of == [0.25, 0.5]


def test_signals_by_hand(results):
    """Of greedy's ten wrong and twenty right answers the mean entropy parts all, and the perplexity parts none."""
    by_name = {(one.signal, one.task): one for one in summarise(results).models[0].signals}
    assert by_name["entropy_mean", ALL].auroc.value == 1.0
    assert by_name["margin_min", ALL].auroc.value == 1.0  # a small one speaks against an answer
    assert by_name["perplexity", ALL].auroc.value == 0.5
    assert by_name["perplexity", ALL].over_control is None
    assert by_name["entropy_mean", ALL].over_control.value == 0.5
    assert (by_name["entropy_mean", "sums"].wrong, by_name["entropy_mean", "sums"].answers) == (10, 20)
    assert ("entropy_mean", "capitals") not in by_name  # all are right


def test_the_command_writes_page_tables_and_figures(results, tmp_path):
    ended = CliRunner().invoke(app, ["bench", "report", str(results), "-o", str(tmp_path / "out")])
    assert ended.exit_code == 0, ended.output
    figures = json.loads((tmp_path / "out" / FIGURES).read_text())
    assert figures["models"][0]["arms"][0]["distinct_open"] is None
    assert figures["models"][0]["arms"][1]["accuracy"]["value"] == pytest.approx(0.6)
    tables = (tmp_path / "out" / TABLES).read_text()
    assert "| warm | 60.0 (60.0 to 60.0) | 20.0 (20.0 to 20.0) | 100.0" in tables
    assert "More than nine in ten draws of copy are greedy's own" in tables


def test_documents_show_parts_of_it_where_their_marks_say(results, tmp_path):
    text = "# Mine\n\n<!-- bench report: {0} -->\n{1}<!-- end -->\nafter\n\n<!-- bench report: machines -->\n<!-- end -->\n"
    document, other = tmp_path / "mine.md", tmp_path / "other.md"
    document.write_text(text.format("signals", "old\n"))
    command = ["bench", "report", str(results), "-o", str(tmp_path), "--into", str(document)]
    for _ in range(2):
        ended = CliRunner().invoke(app, command)
        assert ended.exit_code == 0, ended.output
        shown = document.read_text()
        assert shown.startswith("# Mine\n\n<!-- bench report: signals -->\n### AUROC of signals")
        assert "\n<!-- end -->\nafter\n\n<!-- bench report: machines -->\n### Where answers" in shown
        assert "old" not in shown
        assert shown.count("| entropy_mean |") == 1
    for written, said in (
        (text.format("figures", ""), "has no part 'figures'; a mark names one of findings"),
        ("", "no mark says"),
    ):
        other.write_text(written)
        with pytest.raises(ConfigError, match=said):
            CliRunner().invoke(app, [*command, "--into", str(other)], catch_exceptions=False)
        assert other.read_text() == written


def test_the_page_opens_in_a_browser(results, tmp_path):
    CliRunner().invoke(app, ["bench", "report", str(results), "-o", str(tmp_path)])
    with chromium() as browser, opened(browser, tmp_path / PAGE) as page:
        assert page.title() == NAME
        charts = page.locator(".chart")
        assert charts.count() == page.locator(".chart .main-svg >> nth=0").count() + charts.count() - 1 >= 4
        for index in range(charts.count()):
            assert charts.nth(index).locator(".main-svg").count() >= 1
            assert charts.nth(index).bounding_box()["height"] > 100
        assert page.locator("table").count() >= 5
        assert "warm" in page.locator(".chart").first.inner_text()


def test_a_folder_without_results_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="give the folder that a study wrote"):
        summarise(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match="isn't what a study wrote"):
        summarise(tmp_path)


def test_a_study_that_has_only_begun_is_shown(tmp_path):
    with Store(tmp_path, study()) as store:
        store.add(answer("warm", "sums", 0, 0, True, "t", "tuning", 0))
    ended = CliRunner().invoke(app, ["bench", "report", str(tmp_path)])
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / PAGE).exists()
