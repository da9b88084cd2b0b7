"""The report, in a real browser: what is shown and linked, what a hostile text can do (nothing), size and speed."""

import base64
import gzip
import hashlib
import io
import json
import re
import sys
from html import unescape

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from tests.support.browser import chromium, opened, until
from tests.support.traces import CENTRES, line, varied, written
from vllm_entropix.cli.main import app
from vllm_entropix.observability.report import Source, report, write_report
from vllm_entropix.observability.terminal import TracedText, summary_table
from vllm_entropix.records.branches import Branch
from vllm_entropix.records.regimes import REGIMES, Regime
from vllm_entropix.settings.errors import ConfigError

WORDS = ["Once", " upon", " a", " time", ",", "\n", "there", " lived", " a", " fox"]
ATTACKS = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "<!--",
    "]]>",
    "{{ 7 * 7 }}",
    "'\"><svg onload=alert(3)>",
    "<a href='javascript:alert(4)'>x</a>",
    "\u2028\u2029",
    "\u202e",
    "\u0000\u001b[31m",
    "&lt;b&gt;",
    "",
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


def made(path, *lines):
    write_report(path, [Source("traces.jsonl", lines)])
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A report of two files of two sequences each."""
    folder = tmp_path_factory.mktemp("report")
    first = [line(WORDS, name="fox", forced=[1]), line(["We", " add"], name="sum", prompt=[9])]
    second = [line(["She", " adds"], name="other sum", prompt=[9]), line([*WORDS[:9], " cat"], name="cat", metrics=CENTRES[:3])]
    second[1].token_ids[9] = 7
    path = folder / "report.html"
    write_report(path, [Source("first.jsonl", first), Source("second.jsonl", second)], "Fox and cat")
    return path


@pytest.fixture
def page(browser, plain):
    with opened(browser, plain) as opened_page:
        yield opened_page


def shows(page, request):
    """Wait until a request's first sequence is drawn to the end: its text is there before its charts."""
    drawn = "'ready' in document.documentElement.dataset"
    until(page, f"document.querySelector('.pane .id').textContent === '{request}' && {drawn}")


def dots(page, pane=0):
    """The tokens that are dots in a pane's plane: (regime, token, x, y)."""
    return page.evaluate(
        """(pane) => document.querySelectorAll('.plane')[pane].data.flatMap((trace) =>
            trace.x.map((x, i) => [trace.name, trace.customdata[i], x, trace.y[i]]))""",
        pane,
    )


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_tokens_are_tinted_by_regime_and_by_entropy(page):
    pieces = page.locator(".pane").first.locator(".text bdi")
    assert [pieces.nth(place).text_content() for place in range(5)] == WORDS[:5]
    assert pieces.nth(5).text_content() == "\n"
    classes = [pieces.nth(place).get_attribute("class").split() for place in range(10)]
    assert [names[1] for names in classes] == list(REGIMES) * 2
    assert ["forced" in names for names in classes] == [place == 1 for place in range(10)]

    def tints():
        return pieces.evaluate_all("(all) => all.map((piece) => getComputedStyle(piece).backgroundColor)")

    by_regime = tints()
    assert len(set(by_regime[:5])) == 5
    page.locator("input[value=entropy] + span").click()
    by_entropy = tints()
    entropies = [entropy for entropy, _ in CENTRES]
    order = sorted(range(5), key=lambda place: (entropies[place], place))
    alphas = [float((re.findall(r"/ ([\d.e-]+)\)", tint) or [1])[0]) for tint in by_entropy[:5]]
    assert [alphas[place] for place in order] == sorted(alphas)
    assert alphas[order[0]] < 0.05 < 0.9 < alphas[order[-1]]
    assert by_entropy != by_regime


def branching():
    """Lines of an answer of three branches: one that lost, the answer, which parted from it, and one that parted from that."""
    forks = [
        Branch(id=0, tokens=10, score=-1.5, pruned_at=10),
        Branch(id=1, parent=0, position=3, token=103, tokens=7, score=-0.25, chosen=True),
        Branch(id=2, parent=1, position=8, token=108, tokens=1, score=-2.0, pruned_at=9),
    ]
    texts = [WORDS, [*WORDS[:3], " day", *WORDS[4:]], [*WORDS[:3], " day", *WORDS[4:8], " the"]]
    lines = [line(text, name="forked") for text in texts]
    for one, branch in zip(lines, forks, strict=True):
        one.branch, one.forks = branch, forks if branch.chosen else None
    return lines


@pytest.fixture
def tree(browser, tmp_path):
    lines = [*branching(), line(["We", " add"], name="sum"), *branching()]
    with opened(browser, made(tmp_path / "tree.html", *lines)) as opened_page:
        yield opened_page


def test_the_branches_of_an_answer_are_drawn_and_walked(tree):
    # The answers alone are listed and counted; the page opens on one.
    assert tree.locator("#sequences [role=option]").count() == 3
    assert "3 sequences, 22 tokens, 4 branches beside them" in tree.locator("#summary").inner_text()
    tree.locator("#sequences [role=option]").first.click()
    rows = tree.locator("#branches .branch")
    until(tree, "document.querySelectorAll('#branches .branch').length === 3")
    facts = [" ".join(row.split()) for row in rows.locator(".facts").all_inner_texts()]
    assert facts == [
        "10 tokens · score -1.5 · given up at 10",
        "day 7 tokens · score -0.25 · the answer",
        "the 1 token · score -2 · given up at 9",
    ]
    boxes = [rows.nth(row).locator(".line").bounding_box() for row in range(3)]
    assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    stem, parent = rows.nth(1).locator(".stem").bounding_box(), boxes[0]
    assert parent["x"] < stem["x"] < parent["x"] + parent["width"]
    assert abs(stem["y"] - (parent["y"] + parent["height"] / 2)) < 4
    pieces = tree.locator(".pane .text bdi")
    assert pieces.nth(3).text_content() == " day"
    assert tree.locator("#branches [aria-current]").inner_text() == rows.nth(1).inner_text()
    # Another branch, by the pointer and by the keyboard: its text, from the token with which it parted.
    rows.nth(2).click()
    until(tree, "document.activeElement.dataset.token === '8'")
    assert pieces.nth(8).text_content() == " the"
    assert tree.locator("#branches [aria-current]").inner_text() == rows.nth(2).inner_text()
    rows.nth(1).focus()
    tree.keyboard.press("ArrowUp")
    tree.keyboard.press("Enter")
    until(tree, "document.activeElement.dataset.token === '0'")
    assert pieces.nth(3).text_content() == WORDS[3]
    assert "branch 0" in tree.locator(".pane h2").first.inner_text()
    # Branches of the same answer can be compared; those of another aren't offered.
    others = tree.locator("#compare option").all_text_contents()
    assert sum("branch" in other for other in others) == 1
    # What didn't fork has no tree.
    tree.locator("#sequences [role=option]").nth(1).click()
    until(tree, "document.querySelectorAll('.pane .text bdi').length === 2")
    assert tree.locator("#tree").is_hidden()


def test_a_saved_answer_tells_branches_that_have_no_line(browser, tmp_path):
    [_, answer, _] = branching()
    answer.branch = None
    with opened(browser, made(tmp_path / "saved.html", answer)) as page:
        rows = page.locator("#branches .branch")
        assert rows.evaluate_all("(all) => all.map((row) => row.tagName)") == ["SPAN", "A", "SPAN"]
        assert "id 108" in rows.nth(2).inner_text()


def test_hovering_shows_why(page):
    page.locator(".text bdi").nth(2).hover()
    shown = page.locator("#details")
    text = " ".join(shown.inner_text().split())
    for part in (
        "token 3",
        "id 102",
        "LEHV a fork: explore",
        "entropy 2 bits",
        "varentropy 7 bits²",
        "attention entropy 1.25 bits",
    ):
        assert part in text
    for part in ("agreement 0.0625", "interaction strength 3.5", "temperature 0.666", "top_p 0.9", "top_k 27", "min_p 0.03"):
        assert part in text
    rows = [" ".join(row.split()) for row in shown.locator("li").all_inner_texts()]
    assert rows == ["a 75.0 %", "time 12.5 %", ", 6.3 %"]
    assert shown.locator("li.drawn").count() == 1
    page.locator("h1").hover()
    assert shown.is_hidden()


def test_numbers_and_texts_are_what_was_written(browser, tmp_path):
    """All that is packed comes out as it went in: small, large, negative and missing numbers, and each model's own texts."""
    values = [12.3456, 0.0, None, 0.000123456, -4.5, 98765.4, 3.0, 1e-30]
    shown = ["12.35", "0", "\u2013", "1.2e-4", "-4.5", "98770", "3", "1.0e-30"]
    long = line(["a"] * len(values), name="long")
    for record, value in zip(long.records, values, strict=True):
        record.confidence = value
        record.alternatives = [(2**31 + 5, 0.5), (7, 0.25)]
    long.records[1].alternatives = []
    long.alternative_texts = {7: "seven", 2**31 + 5: "far"}
    same, other = (long.model_copy(update={"request_id": name}) for name in ("same", "other"))
    same.alternative_texts, other.alternative_texts = {7: "SEVEN", 2**31 + 5: "far"}, {7: "sept"}
    other.model = "another"
    with opened(browser, made(tmp_path / "report.html", long, same, other)) as page:
        pieces = page.locator(".text bdi")
        for place, text in enumerate(shown):
            pieces.nth(place).hover()
            assert page.locator("#details dt", has_text="confidence").locator("+ dd").inner_text() == text
            assert page.locator("#details li").count() == (0 if place == 1 else 2)
        for place, texts in enumerate((["far", "seven"], ["far", "SEVEN"], [f"id {2**31 + 5}", "sept"])):
            page.locator(f"#sequence-{place}").click()
            shows(page, ("long", "same", "other")[place])
            pieces.first.hover()
            assert page.locator("#details li bdi").all_inner_texts() == texts


def test_keys_go_through_the_text(page):
    text = page.locator(".text").first
    text.locator("bdi").first.focus()

    def at():
        return page.evaluate("document.activeElement.dataset.token")

    for key, place in (
        ("ArrowRight", "1"),
        ("ArrowRight", "2"),
        ("ArrowLeft", "1"),
        ("ArrowDown", "7"),
        ("End", "9"),
        ("Home", "0"),
    ):
        page.keyboard.press(key)
        assert at() == place, key
        assert page.locator("#details").is_visible()
    assert text.locator("bdi[tabindex='0']").count() == 1, "one stop of the tab key"
    page.keyboard.press("Escape")
    assert page.locator("#details").is_hidden()


def test_it_opens_on_what_there_is_to_see_and_names_it(browser, tmp_path):
    sure = line(["42"] * 30, name="chatcmpl-1a", prompt=[4], metrics=CENTRES[:1])
    asked = "<|user|>Tell me about\nthe fox.<|end|><|assistant|>"
    most = line(WORDS, name="chatcmpl-2b", prompt_text=asked, forced=[1])
    with opened(browser, made(tmp_path / "report.html", sure, most, line(["So", "."], name="chatcmpl-3c", prompt=[5]))) as page:
        assert page.locator(".pane h2").inner_text() == "Tell me about the fox."
        assert page.locator(".pane .id").inner_text() == "chatcmpl-2b"
        assert page.locator(".pane .prompt").text_content() == asked
        assert page.locator("#sequences [aria-selected=true]").inner_text().split("\n") == [
            "Tell me about the fox.",
            "10",
            "Once upon a time, there lived a fox",
        ]
        assert page.locator("#sequences .name bdi").all_text_contents()[::2] == ["42" * 30, "So."]
        page.locator("#order").select_option("interest")
        assert page.locator("#sequences .name bdi").all_text_contents()[1:] == ["So.", "42" * 30]
        page.locator("#filter").fill("chatcmpl-3c")
        page.locator("#sequences [role=option]").click()
        until(page, "document.querySelector('.pane h2').textContent === 'So.'")
        assert page.locator(".pane .prompt").count() == 0, "its prompt was not kept"


def test_tokens_are_tinted_by_their_probability(browser, tmp_path):
    traced = line(["sure", " unlikely", " below", " unknown"])
    alternatives = [[(100, 0.9), (7, 0.1)], [(7, 0.5), (101, 0.25)], [(7, 0.5), (8, 0.125)], []]
    for record, those in zip(traced.records, alternatives, strict=True):
        record.alternatives = those
    with opened(browser, made(tmp_path / "report.html", traced)) as page:
        page.locator("input[value=probability] + span").click()
        pieces = page.locator(".text bdi")
        tints = pieces.evaluate_all("(all) => all.map((piece) => getComputedStyle(piece).backgroundColor)")
        assert [float((re.findall(r"/ ([\d.e-]+)\)", tint) or [1])[0]) for tint in tints] == [
            pytest.approx(share, abs=0.01) for share in (0.1, 0.75, 0.875, 0)
        ]
        borders = pieces.evaluate_all("(all) => all.map((piece) => getComputedStyle(piece).borderBottomStyle)")
        assert [border == "dotted" for border in borders] == [False, False, True, False]
        assert "below the smallest shown" in " ".join(page.locator("#legend").inner_text().split())
        said = ["probability 90.0 %", "probability 25.0 %", "below the smallest shown (12.5 %)", "probability not recorded"]
        for place, words in enumerate(said):
            pieces.nth(place).hover()
            assert words in page.locator("#details .why").inner_text()
        page.get_by_role("button", name="probability", exact=True).click()
        assert page.evaluate("document.querySelector('.along').data.at(-1).y") == [0.9, 0.25, None, None]


def test_all_sequences_together(page):
    page.get_by_role("link", name="All together").click()
    assert page.locator("#view-one").is_hidden()
    rows = [row.split() for row in page.locator("#regimes tr").all_inner_texts()]
    assert rows[0] == ["first.jsonl", "second.jsonl"]
    assert rows[2][-6:] == ["3", "25.0", "%", "5", "41.7", "%"]
    assert rows[-1][-6:] == ["1", "8.3", "%", "0", "0.0", "%"]
    histograms = page.evaluate("[...document.querySelectorAll('#histograms .chart')].map((c) => [c.id, c.data.length])")
    assert histograms == [[f"histogram-{field}", 2] for field in ("entropy", "varentropy", "attention_entropy")]
    shares = page.evaluate("document.getElementById('histogram-entropy').data[0].y")
    assert sum(share or 0 for share in shares) == pytest.approx(100)
    widths = page.locator("#histograms .main-svg:first-child").evaluate_all("(all) => all.map((svg) => svg.clientWidth)")
    assert len(set(widths)) == 1, "each is as wide as its place"
    # The most uncertain token leads into its sequence.
    link = page.locator("#uncertain a").nth(1)
    assert link.text_content() == "Once upon a time,there lived a fox"  # the sign of a line break is in its style
    link.focus()
    page.keyboard.press("Enter")
    until(page, "document.activeElement.dataset.token === '3'")
    assert page.locator(".pane .id").first.inner_text() == "fox"
    assert page.locator("#details").is_visible()
    assert page.locator(".views a[aria-current]").inner_text() == "One by one"
    page.go_back()
    until(page, "document.getElementById('view-one').hidden")


def test_everything_is_reached_by_the_tab_key(page):
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.role"))
    assert {"filter", "order", "sequences", "tint", "scale", "compare", "option"} <= reached


def test_text_plane_and_lines_are_linked(page):
    assert sorted(dots(page)) == sorted(
        [regime, place, pytest.approx(CENTRES[place % 5][0] ** 0.5), pytest.approx(CENTRES[place % 5][1] ** 0.5)]
        for place, regime in enumerate(REGIMES * 2)
    )
    # From the text to the charts.
    page.locator(".text bdi").nth(2).hover()
    until(page, "document.querySelector('.plane').layout.shapes.at(-1).visible === true")
    ring = page.evaluate("document.querySelector('.plane').layout.shapes.at(-1)")
    assert (ring["xanchor"], ring["yanchor"]) == (pytest.approx(2**0.5), pytest.approx(7**0.5))
    assert page.evaluate("document.querySelector('.along').layout.shapes[0].x0") == 3
    # From the plane to the text.
    page.locator("h1").hover()
    place = page.evaluate(
        """() => {
            const chart = document.querySelector('.plane'), box = chart.getBoundingClientRect();
            const {xaxis, yaxis} = chart._fullLayout;
            return [box.left + xaxis._offset + xaxis.d2p(Math.sqrt(6)), box.top + yaxis._offset + yaxis.d2p(3)];
        }"""
    )
    page.mouse.move(*place, steps=4)
    page.wait_for_selector(".text bdi.here")
    assert page.locator(".text bdi.here").get_attribute("class").split()[1] == "HEHV"
    page.mouse.click(*place)
    assert page.evaluate("document.activeElement.classList.contains('HEHV')")


def test_the_plane_shows_the_borders_of_the_regimes(page):
    drawn = page.evaluate("document.querySelector('.plane').layout.shapes.slice(0, 4).map((s) => [s.x0, s.x1, s.y0, s.y1])")
    hehv, lehv, helv, lelv = ([value if value < 0 else value**2 for value in shape] for shape in drawn)
    assert (hehv[0], hehv[2]) == (pytest.approx(3), pytest.approx(5))
    assert (lehv[1], lehv[2]) == (pytest.approx(5), pytest.approx(5))
    assert (helv[0], helv[3]) == (pytest.approx(5), pytest.approx(0.1))
    assert (lelv[1], lelv[3]) == (pytest.approx(0.1), pytest.approx(0.1))
    for scale, x in (("linear", 6.0), ("log", 0.7781512503836436)):
        page.locator(f"input[value={scale}] + span").click()
        assert sorted(dots(page))[0][0] == "ADAPTIVE"
        assert max(dot[2] for dot in dots(page)) == pytest.approx(x)


def test_metrics_along_the_sequence_can_be_chosen(page):
    def rows():
        return page.evaluate("document.querySelector('.along').data.map((trace) => trace.y[0])")

    assert rows() == [0.02, 0.05, 1.25]
    page.get_by_role("button", name="temperature").first.click()
    assert rows() == [0.02, 0.05, 1.25, 0.666]
    assert page.evaluate("document.activeElement.textContent") == "temperature"


def test_two_files_stand_side_by_side(page):
    panes = page.locator(".pane")
    assert panes.count() == 2
    assert panes.locator(".id").all_inner_texts() == ["fox", "cat"], "those of the same prompt"
    assert "differs from token 10 on" in panes.first.inner_text()
    left, right = panes.first.bounding_box(), panes.last.bounding_box()
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    page.locator("#sequences").focus()
    page.keyboard.press("ArrowDown")
    until(page, "document.querySelectorAll('.pane .id')[1]?.textContent === 'other sum'")
    page.locator("#compare").select_option(label="first.jsonl: Once upon a time, there lived a fox")
    until(page, "document.querySelectorAll('.pane .id')[1]?.textContent === 'fox'")
    page.locator("#compare").select_option(label="nothing")
    until(page, "document.querySelectorAll('.pane').length === 1")


def test_shares_of_the_regimes(page):
    shares = page.evaluate("document.getElementById('shares').data.map((trace) => [trace.name, trace.x])")
    assert [name for name, _ in shares] == list(REGIMES)
    # Bottom to top: all of file 2, all of file 1, right, left.
    assert dict(shares)["ADAPTIVE"] == [0, pytest.approx(100 * 2 / 12), 0, 20]
    assert dict(shares)["LELV"][2:] == [40, 20]


def test_scores_of_the_answer_are_shown_and_ordered_by(page):
    told = page.locator(".pane").first.locator(".scores > div").all_text_contents()
    assert any(text.startswith("mean entropy") and text.endswith(" bits") for text in told)
    assert not any(text.startswith("perplexity") for text in told), "these records tell no log-probabilities"
    page.locator("#order").select_option("entropy_mean")
    assert page.locator("#order option").evaluate_all("(all) => all.map((one) => one.value)").count("entropy_mean") == 1


def test_sequences_are_found_and_ordered(page):
    page.locator("#filter").fill("adds")
    assert page.locator("#sequences [role=option] .name bdi").all_text_contents() == ["She adds"]
    page.locator("#filter").fill("")
    page.locator("#order").select_option("tokens")
    assert page.locator("#sequences [role=option] .name span").all_text_contents() == ["10", "10", "2", "2"]


@pytest.mark.parametrize(("width", "beside"), [(1400, True), (1280, True), (1100, True), (1000, False)])
def test_compared_sequences_stand_side_by_side_where_there_is_room(browser, plain, width, beside):
    with opened(browser, plain, width=width) as page:
        left, right = (page.locator(".pane").nth(place).bounding_box() for place in (0, 1))
        assert (left["y"] == right["y"] and left["x"] + left["width"] < right["x"]) == beside
        charts = page.locator(".pane .plane").evaluate_all("(all) => all.map((chart) => chart.getBoundingClientRect().top)")
        assert (charts[0] == charts[1]) == beside, "so do their charts"
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 360])
def test_light_dark_and_narrow(browser, plain, scheme, width):
    with opened(browser, plain, width=width, scheme=scheme) as page:
        background, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, ink)]
        assert (brightness[0] > brightness[1]) == (scheme == "light")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"
        colours = page.evaluate("document.querySelector('.plane').data.map((trace) => trace.marker.color)")
        assert colours == [regime.dark if scheme == "dark" else regime.light for regime in Regime]


# --- what a text can do -----------------------------------------------------------------------------------------------


def test_the_page_names_its_scripts_and_nothing_else():
    html = report([Source("<b>file</b>", [line(ATTACKS, name=text) for text in ATTACKS])], "<title>")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.S)
    assert len(scripts) == 4
    policy = unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', html).group(1))
    ours = scripts[1:3]  # between the index and what is packed
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in ours]
    assert re.findall(r"sha256-([^']*)", policy) == hashes
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    rest = html
    for script in ours:
        rest = rest.replace(script, "")
    assert not any(text in rest for text in ATTACKS if "<" in text and text != "<!--")
    assert not re.search(r"https?://", rest)


def test_hostile_texts_are_only_texts(browser, tmp_path):
    traces = [line(ATTACKS, name=text) for text in ATTACKS]
    for trace in traces:
        trace.alternative_texts = {token: ATTACKS[token % len(ATTACKS)] for token in range(99, 120)}
        trace.model = trace.finish_reason = "<script>alert(5)</script>"
    path = tmp_path / "report.html"
    write_report(
        path, [Source("<script>alert(6)</script>", traces), Source("<i>second</i>", traces)], "<script>alert(7)</script>"
    )
    with opened(browser, path) as page:
        assert page.locator("h1").inner_text() == "<script>alert(7)</script>"
        assert page.locator("body script").count() == 3  # two of data, and ours; the charts' has moved to the head
        for place in range(len(ATTACKS)):
            page.locator(".text").first.locator("bdi").nth(place).hover()
            assert page.locator("#details li").count() == 3
        texts = page.locator(".text").first.locator("bdi").all_text_contents()
        assert texts[:7] == ATTACKS[:7]
        assert texts[7:10] == ["U+2028U+2029", "U+202E", "U+0000U+001B[31m"]
        for place in range(len(traces)):
            page.evaluate("(place) => document.getElementById(`sequence-${place}`).click()", place)
        assert page.locator(".text img, .text svg, .text a, .text script, nav img, nav a").count() == 0


def test_marks_of_direction_end_with_their_token(browser, tmp_path):
    texts = ["\u202eevil", " stays", "\u2067x", " put", " \u05e9\u05dc\u05d5\u05dd", " end"]
    hebrew = [" \u05e9\u05dc\u05d5\u05dd", " \u05e2\u05d5\u05dc\u05dd", "!"]
    with opened(browser, made(tmp_path / "report.html", line(texts), line(hebrew, name="hebrew", prompt=[4]))) as page:
        pieces = page.locator(".text bdi")
        assert pieces.evaluate_all("(all) => all.map((piece) => getComputedStyle(piece).unicodeBidi)") == ["isolate"] * 6
        lefts = pieces.evaluate_all("(all) => all.map((piece) => piece.getBoundingClientRect().left)")
        assert lefts == sorted(lefts), "tokens stand in their order"
        assert pieces.nth(0).text_content() == "U+202Eevil"
        # A text from right to left runs so as a whole, and so do the keys.
        page.locator("#sequence-1").click()
        until(page, "document.querySelector('.text').dir === 'rtl'")
        lefts = pieces.evaluate_all("(all) => all.map((piece) => piece.getBoundingClientRect().left)")
        assert lefts == sorted(lefts, reverse=True)
        pieces.first.focus()
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.dataset.token") == "1"


def test_a_hundred_thousand_tokens(browser, tmp_path):
    path = made(tmp_path / "report.html", line(["word "] * 100_000, not_kept=10))
    with opened(browser, path) as page:
        assert page.locator(".text bdi").count() == 2000, "a page of them at a time"
        assert "tokens 1\u20132,000 of 100,000" in page.locator(".pages").inner_text()
        assert len(dots(page)) == 2000
        page.locator(".text bdi").first.focus()
        page.keyboard.press("End")
        assert page.evaluate("document.activeElement.dataset.token") == "99999"
        assert "after the server's cap" in page.locator("#details").inner_text()
        assert len(dots(page)) == 1990
        page.keyboard.press("PageUp")
        assert page.evaluate("document.activeElement.dataset.token") == "97999"


@pytest.mark.alone
def test_a_thousand_sequences_open_at_once(browser, tmp_path):
    different = [varied(120, seed) for seed in range(40)]
    named = (different[number % 40].model_copy(update={"request_id": f"request {number}"}) for number in range(1000))
    path = made(tmp_path / "report.html", *named)
    assert path.stat().st_size < 20e6
    seconds = []
    for _ in range(3):  # the browser itself starts with the first; what else the machine does only adds to it
        with opened(browser, path) as page:
            assert page.locator("#sequences [role=option]").count() == 1000
            # From the navigation's beginning until the charts are drawn, by the browser's clock.
            seconds.append(int(page.get_attribute("html", "data-ready")) / 1000)
    assert min(seconds) < 2


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_what_it_says(tmp_path):
    path, output = written(tmp_path / "traces.jsonl", line(WORDS)), tmp_path / "out.html"
    ended = CliRunner().invoke(app, ["report", str(path), "-o", str(output)])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout == f"wrote {output}\n"
    assert "<!doctype html>" in output.read_text(encoding="utf-8")


RESPONSE = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1767323045,
    "model": "model",
    "choices": [{"index": 0, "text": "Once upon", "finish_reason": "length", "entropix": {"version": 1, "tokens": []}}],
}


def test_the_command_reads_compressed_files_standard_input_and_responses(browser, tmp_path):
    plain = written(tmp_path / "traces.jsonl", line(WORDS))
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes() + b'{"half a line\n'))
    saved = tmp_path / "response.json"
    tokens = [entry.model_dump(mode="json") for entry in line(["Once", " upon"]).records]
    RESPONSE["choices"][0]["entropix"]["tokens"] = tokens
    saved.write_text(json.dumps(RESPONSE))
    output = tmp_path / "out.html"
    command = ["report", str(packed), "-", str(saved)]
    ended = CliRunner().invoke(app, [*command, "-o", str(output)], input=plain.read_bytes())
    assert ended.exit_code == 0, ended.output
    with opened(browser, output) as page:
        assert page.locator("#summary").inner_text().startswith("packed.jsonl.gz · standard input · response.json — 3 seq")
        assert page.locator("#left-out").inner_text() == "Left out, because they aren't traces: 1 line of packed.jsonl.gz."
        page.locator("#sequence-2").click()
        shows(page, "cmpl-1")
        assert page.locator(".pane h2").first.inner_text() == "Once upon"
        assert page.evaluate("document.querySelector('.plane').layout.shapes.length") == 1, "a response tells no borders"
    ended = CliRunner().invoke(app, [*command, "--terminal"], input=plain.read_bytes())
    assert ended.exit_code == 0, ended.output
    assert "packed.jsonl.gz: 1 line that isn't a trace was left out" in ended.stdout
    assert "Once upon" in ended.stdout


def test_mistakes_are_one_sentence(tmp_path, monkeypatch):
    empty = written(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match=r"no traces in empty\.jsonl"):
        report([Source("empty.jsonl", [])])
    ended = CliRunner().invoke(app, ["report", str(empty), "-o", str(tmp_path / "out.html")])
    assert isinstance(ended.exception, ConfigError)
    with pytest.raises(ConfigError, match=r"can't write the report to /nowhere/out\.html: No such file"):
        write_report("/nowhere/out.html", [Source("traces", [line(WORDS)])])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"needs jinja2.*install vllm-entropix\[report\]"):
        report([Source("traces", [line(WORDS)])])


def test_the_terminal_shows_it_too(tmp_path):
    path = written(
        tmp_path / "traces.jsonl", line([*WORDS, "\x1b[2J", "\u202e"], name="[red]fox[/red]\x1b]0;x\x07", forced=[1])
    )
    ended = CliRunner().invoke(app, ["report", str(path), "--terminal"], env={"COLUMNS": "140"})
    assert ended.exit_code == 0, ended.output
    assert "Once upon a time" in ended.stdout
    assert "[red]fox[/red]<U+001B>" in ended.stdout, "an id isn't markup"
    assert "<U+001B>[2J<U+202E>" in ended.stdout
    assert "\x1b" not in ended.stdout
    assert all(regime in ended.stdout for regime in REGIMES)
    assert "Regimes and metrics per sequence" in ended.stdout


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140])
def test_headings_and_numbers_are_whole_at_any_width(width):
    long = varied(1234, 1)
    sequences = [
        TracedText(name, long.texts, long.records) for name in ("a", "What is 384 + 259, and why? " * 3, "\u65e5" * 40)
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(summary_table(sequences, width))
    shown = console.file.getvalue()
    assert all(cell_len(row) <= width for row in shown.splitlines())
    for heading in (
        *(["sequence"] if width >= 72 else []),
        "tokens",
        *REGIMES,
        "forced",
        *(["entropy", "bits"] if width >= 80 else []),
    ):
        assert heading in shown
    assert shown.count("1234") == 3


def test_tokens_without_a_regime_are_a_kind_of_their_own(browser, tmp_path):
    """Those of samplers that have no regimes, beside entropix's."""
    plain = line(WORDS, name="entropix", prompt_text="with")
    records = [entry.model_copy(update={"regime": None, "confidence": None}) for entry in plain.records]
    without = plain.model_copy(update={"records": records, "sampler": None, "request_id": "another", "prompt": "without"})
    with opened(browser, made(tmp_path / "report.html", without, plain)) as page:
        page.locator("#sequence-0").click()
        shows(page, "another")
        assert page.locator(".text bdi.NONE").count() == len(WORDS)
        assert {name for name, *_ in dots(page)} == {"NONE"}
        page.locator(".text bdi").first.focus()
        assert "NONE a sampler without regimes" in page.locator("#details").inner_text()
        page.locator("#sequence-1").click()
        shows(page, "entropix")
        assert page.locator(".text bdi.NONE").count() == 0
        page.get_by_role("link", name="All together").click()
        until(
            page,
            "!document.querySelector('#view-all').hidden && document.querySelector('#regimes').textContent.includes('NONE')",
        )
