"""A study's report: one HTML page, the same tables as Markdown, and every figure as JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_entropix._version import __version__
from vllm_entropix.bench.signals import ALL
from vllm_entropix.bench.statistics import Interval
from vllm_entropix.bench.summary import ModelSummary, Summary, as_json
from vllm_entropix.bench.tables import all_tables, interval, points, signals
from vllm_entropix.observability.page import json_for_script, plotly_script, script_hash, template
from vllm_entropix.settings.errors import ConfigError, quoted

PAGE, TABLES, FIGURES = "report.html", "report.md", "summary.json"
# In a document: what a part of the report stands between.
_MARKED = re.compile(r"(<!-- bench report: (.*?) -->\n).*?(<!-- end -->)", re.S)
_ROW, _AROUND = 26, 90  # pixels of a chart


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture, as plotly.js draws it.

    Attributes:
        title: of it.
        note: what there is to see, in a sentence.
        data: traces of plotly.js.
        layout: of plotly.js, without colours.
        height: pixels.
    """

    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 360


def _intervals(title: str, note: str, unit: str, found: list[tuple[str, Interval]], zero: bool = False) -> Chart:
    """Estimates with their intervals, one below the other."""
    shown = [(name, of) for name, of in reversed(found) if not math.isnan(of.value)]
    values = [100 * of.value for _, of in shown]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [100 * (of.high - of.value) for _, of in shown],
        "arrayminus": [100 * (of.value - of.low) for _, of in shown],
    }
    data = {"type": "scatter", "mode": "markers", "x": values, "y": [name for name, _ in shown], "error_x": error}
    layout = {
        "xaxis": {"title": {"text": unit}, **({"zeroline": True, "zerolinewidth": 2} if zero else {})},
        "showlegend": False,
    }
    return Chart(title, note, [data], layout, _AROUND + _ROW * len(shown))


def _best_of(model: ModelSummary) -> Chart:
    most = max(len(tuned.best_of) for tuned in model.tuned)
    data = []
    for tuned in model.tuned:
        # What has nothing to tune is as good after any number of tries.
        curve = tuned.best_of * most if len(tuned.best_of) == 1 else tuned.best_of
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": tuned.sampler,
                "x": list(range(1, len(curve) + 1)),
                "y": [100 * value for value in curve],
            }
        )
    return Chart(
        f"Expected best of the first k configurations, {model.model}",
        "On the tuning split, whose best values are too good by luck: compare curves, and take accuracies from the test split.",
        data,
        {"xaxis": {"title": {"text": "k"}}, "yaxis": {"title": {"text": "accuracy, per cent"}}},
        420,
    )


def _quality_and_diversity(model: ModelSummary) -> Chart | None:
    arms = [arm for arm in model.arms if not math.isnan(arm.accuracy.value) and not math.isnan(arm.distinct_open)]
    if not arms:
        return None
    data = [
        {
            "type": "scatter",
            "mode": "markers+text",
            "x": [100 * arm.distinct_open],
            "y": [100 * arm.accuracy.value],
            "text": [arm.sampler],
            "name": arm.sampler,
            "textposition": "top center",
        }
        for arm in arms
    ]
    return Chart(
        f"Quality and diversity, {model.model}",
        "Further up: more often right. Further right: open prompts are answered in more different words.",
        data,
        {
            "xaxis": {"title": {"text": "different 4-grams in open prompts, per cent"}},
            "yaxis": {"title": {"text": "accuracy of one draw, per cent"}},
            "showlegend": False,
        },
        420,
    )


def _signals(model: ModelSummary) -> list[Chart]:
    return [
        _intervals(
            f"AUROC of signals on the answers of {sampler}, {model.model}",
            "Over all tasks; 50 is chance, and perplexity is what plain log-probabilities tell.",
            "AUROC, per cent",
            [(one.signal, one.auroc) for one in model.signals if (one.sampler, one.task) == (sampler, ALL)],
        )
        for sampler in dict.fromkeys(one.sampler for one in model.signals)
    ]


def _regimes(model: ModelSummary) -> Chart | None:
    names = sorted({name for arm in model.arms for name in arm.signals if name.startswith("share_")} - {"share_argmax"})
    arms = [arm for arm in model.arms if any(name in arm.signals for name in names)]
    if not arms:
        return None
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name.removeprefix("share_").upper(),
            "y": [arm.sampler for arm in reversed(arms)],
            "x": [100 * arm.signals.get(name, 0) for arm in reversed(arms)],
        }
        for name in names
    ]
    layout = {"barmode": "stack", "xaxis": {"title": {"text": "tokens, per cent"}}}
    return Chart(f"Tokens by regime, {model.model}", "Means over answers.", data, layout, _AROUND + _ROW * len(arms))


def charts(summary: Summary) -> list[Chart]:
    """All pictures, in the report's order."""
    found: list[Chart | None] = []
    for model in summary.models:
        compared = [one for one in summary.comparisons if one.model == model.model]
        for against in dict.fromkeys(one.against for one in compared):
            found.append(
                _intervals(
                    f"Difference to {against}, {model.model}",
                    "Paired by item, with intervals of 95 %: right of 0 is better.",
                    "points",
                    [(one.sampler, one.difference) for one in compared if one.against == against],
                    zero=True,
                )
            )
        if model.arms:
            accuracies = [(arm.sampler, arm.accuracy) for arm in model.arms]
            found.append(
                _intervals(
                    f"Accuracy of one draw, {model.model}",
                    "Mean over tasks, with intervals of 95 % by item. What overlaps may differ still: see the differences.",
                    "per cent",
                    accuracies,
                )
            )
        found += [_quality_and_diversity(model), *_signals(model), _regimes(model)]
        if model.tuned:
            found.append(_best_of(model))
    return [chart for chart in found if chart is not None]


def findings(summary: Summary) -> list[str]:
    """The differences that the study shows, in a sentence each; one sentence if it shows none."""
    told = [
        f"{one.model}: {one.sampler} is {'better' if one.difference.value > 0 else 'worse'} than {one.against}, by "
        f"{interval(one.difference, points)} points (p = {one.holm:.2g} after Holm)."
        for one in summary.comparisons
        if one.holm < 0.05
    ]
    rest = len(summary.comparisons) - len(told)
    if rest:
        told.append(f"Of {len(summary.comparisons)} comparisons, {rest} show no difference after Holm's correction.")
    return told


def _about(summary: Summary) -> str:
    study = summary.study
    return (
        f"{summary.answers:,} answers; {len(summary.models)} of {len(study.models)} models, {len(study.samplers)} samplers, "
        f"{study.configurations} random configurations of each that has any, {len(study.tasks)} tasks, {study.draws} draws of "
        f"each item of the test split; seed {study.seed}."
    )


def _session(session: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in session.get("versions", {}).items())
    machine = f"{session.get('cpu')}, {session.get('cores')} cores, {session.get('memory_gib')} GiB"
    return f"{session.get('started')}: {session.get('command')}; {machine}; Python {session.get('python')}, {versions}"


def page(summary: Summary) -> str:
    """The report as one HTML file that needs no network; ConfigError if jinja2 isn't installed."""
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ConfigError(f"a report needs jinja2 ({error}); install vllm-entropix again by pip") from None
    drawn = charts(summary)
    plotly, script = plotly_script(), template("bench.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Markup is what is ours: style and scripts, and JSON that can't end its element. All else is escaped.
    return environment.from_string(template("bench.html.j2")).render(
        title=summary.study.name,
        version=__version__,
        about=_about(summary),
        findings=findings(summary),
        charts=drawn,
        tables=all_tables(summary),
        sessions=[_session(one) for one in summary.sessions],
        script_hashes=" ".join((script_hash(plotly), script_hash(script))),
        style=Markup(template("bench.css")),
        data=Markup(json_for_script([{"data": chart.data, "layout": chart.layout} for chart in drawn])),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def _parts(summary: Summary) -> dict[str, str]:
    """What a document can show of the report, in Markdown."""
    told = [_about(summary), "", *(f"- {sentence}" for sentence in findings(summary))]
    tables = [table.markdown() for table in all_tables(summary)]
    of_signals = [table.markdown() for model in summary.models if (table := signals(model)).rows]
    machines = ["### Where answers were asked for", "", *(f"- {_session(one)}" for one in summary.sessions)]
    return {
        "findings": "\n".join(told),
        "tables": "\n\n".join(tables),
        "signals": "\n\n".join(of_signals),
        "machines": "\n".join(machines),
    }


def markdown(summary: Summary) -> str:
    """The report's sentences and tables as Markdown."""
    parts = _parts(summary)
    return "\n\n".join([f"## {summary.study.name}", *(parts[name] for name in ("findings", "tables", "machines"))]) + "\n"


def filled(document: str, summary: Summary) -> str:
    """A document with the parts of the report that its marks name: ``<!-- bench report: signals -->``, up to ``<!-- end -->``.

    Raises:
        ConfigError: there is no mark, or one names no part.
    """
    parts = _parts(summary)

    def part(mark: re.Match[str]) -> str:
        begin, name, end = mark.groups()
        if name not in parts:
            raise ConfigError(f"the report has no part {quoted(name)}; a mark names one of {', '.join(parts)}")
        return f"{begin}{parts[name]}\n{end}"

    document, marks = _MARKED.subn(part, document)
    if not marks:
        raise ConfigError("no mark says where the report goes; write <!-- bench report: tables --> and below it <!-- end -->")
    return document


def write(summary: Summary, folder: Path) -> list[Path]:
    """Write all three into a folder; gives their paths."""
    written = []
    for name, text in (
        (PAGE, page(summary)),
        (TABLES, markdown(summary)),
        (FIGURES, json.dumps(as_json(summary), indent=1, ensure_ascii=False) + "\n"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written
