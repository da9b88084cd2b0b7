"""``vllm-entropix scores``: which score tells wrong answers from right ones, and where to draw the line."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_entropix.observability.evaluation import Evaluated, Labelled, evaluate
from vllm_entropix.observability.labels import read_labels
from vllm_entropix.observability.selective import COVERAGES, Interval
from vllm_entropix.observability.terminal import printable
from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.records.scores import BY_NAME, CONTROL, markdown_table
from vllm_entropix.settings.errors import ConfigError

# Coverages whose accuracy the table shows.
_SHOWN = (0.5, 0.8, 1.0)


def scores(
    traces: Annotated[list[Path] | None, typer.Argument(help="Files of traces.", show_default=False)] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the columns request_id and correct (1 or 0), and index, item, or others if you like.",
            show_default=False,
        ),
    ] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(help="Choose the threshold that gives the most answers of which so many are right.", min=0, max=1),
    ] = None,
    coverage: Annotated[
        float | None, typer.Option(help="Choose the threshold that gives so many of the answers.", min=0, max=1)
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Column of the labels, such as a task, whose values get figures of their own.")
    ] = None,
    resamples: Annotated[int, typer.Option(help="Resamples of the bootstrap by item.", min=100, max=100_000)] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole risk-coverage curves.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of scores as Markdown, and nothing else.")
    ] = False,
) -> None:
    """Hold the scores of answers against labels: AUROC, risk and coverage with 95 % intervals, and a threshold."""
    if markdown:
        typer.echo(markdown_table())
        return
    if not traces or labels is None:
        raise ConfigError("scores needs files of traces and --labels; docs/scoring-answers.md shows how to make both")
    if accuracy is not None and coverage is not None:
        raise ConfigError("--accuracy and --coverage each choose a threshold; give one of them")
    labelled = Labelled.join(chain.from_iterable(map(read_traces, traces)), read_labels(labels, by))
    parts: dict[str, Labelled] = {"": labelled}
    if by is not None:
        parts |= {
            group: labelled.of_group(group) for group in sorted({group for group in labelled.groups if group is not None})
        }
    found = {name: evaluate(part, resamples, seed, accuracy, coverage) for name, part in parts.items()}
    if as_json:
        typer.echo(json.dumps(_as_json(labelled, found, by, resamples, seed), indent=2))
        return
    console = Console()
    for name, part in parts.items():
        console.print(_table(f"{by} {name}" if name else "All answers", part, found[name]))
    console.print(Text(_left_out(labelled), "dim"))
    if accuracy is not None:
        _print_thresholds(console, found[""], f"an accuracy of {accuracy:g}")
    elif coverage is not None:
        _print_thresholds(console, found[""], f"a coverage of {coverage:g}")


def _as_json(
    labelled: Labelled, found: dict[str, list[Evaluated]], by: str | None, resamples: int, seed: int
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "answers": len(labelled.wrong),
        "items": len(set(labelled.items)),
        "wrong": sum(labelled.wrong),
        "without_label": labelled.without_label,
        "without_trace": labelled.without_trace,
        "control": CONTROL,
        "resamples": resamples,
        "seed": seed,
        "scores": [one.to_dict() for one in found[""]],
    }
    if by is not None:
        groups = {name: [one.to_dict() for one in of] for name, of in found.items() if name}
        told |= {"by": by, "groups": groups}
    return told


def _table(title: str, labelled: Labelled, found: list[Evaluated]) -> Table:
    heading = f"{title}: {len(labelled.wrong):,} answers to {len(set(labelled.items)):,} items, {sum(labelled.wrong):,} wrong"
    table = Table(title=Text(printable(heading), "bold"), title_justify="left")
    table.add_column("score")
    for column in ("AUROC", "over log-probabilities", *(f"accuracy at {coverage:.0%}" for coverage in _SHOWN)):
        table.add_column(column, justify="right")
    if not found:
        table.add_row("none is known of right and of wrong answers", *[""] * 5)
    for one in found:
        label = BY_NAME[one.score].label + (" (log-probabilities)" if one.score == CONTROL else "")
        risks = dict(zip(COVERAGES, one.risks, strict=True))
        accuracies = [Interval(1 - risk.value, 1 - risk.high, 1 - risk.low) for risk in (risks[each] for each in _SHOWN)]
        over = "" if one.over_control is None else _shown(one.over_control, signed=True)
        table.add_row(label, _shown(one.auroc), over, *map(_shown, accuracies))
    return table


def _shown(interval: Interval, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _left_out(labelled: Labelled) -> str:
    told = "Intervals hold 95 % of the resamples of a bootstrap by item."
    if labelled.without_label:
        told += f" Traces without a label: {labelled.without_label:,}."
    if labelled.without_trace:
        told += f" Labels without a trace: {labelled.without_trace:,}."
    return told


def _print_thresholds(console: Console, found: list[Evaluated], target: str) -> None:
    reached = [one for one in found if one.threshold is not None]
    if not reached:
        raise ConfigError(f"no score's threshold reaches {target}")
    table = Table(title=Text(f"Thresholds for {target}", "bold"), title_justify="left")
    for column in ("score", "answers abstain if it is", "accuracy", "coverage", "accuracy held out", "coverage held out"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for one in reached:
        threshold, (key, value) = one.threshold, one.bound()
        assert threshold is not None
        table.add_row(
            BY_NAME[one.score].label,
            f"{key.rpartition('_')[2]} {value:.4g}",
            f"{threshold.accuracy:.3f}",
            f"{threshold.coverage:.3f}",
            _shown(threshold.held_out_accuracy),
            _shown(threshold.held_out_coverage),
        )
    console.print(table)
    best = reached[0]
    key, value = best.bound()
    asks = {"vllm_xargs": {"entropix_abstain_score": best.score, key: value}}
    # Not by rich, which would break the line.
    typer.echo(f"In a request, for the score with the best AUROC:\n{json.dumps(asks)}")
