"""A study's tables: rows of texts, which Markdown, HTML and the terminal show alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_entropix.bench.signals import ALL, Told
from vllm_entropix.bench.statistics import Interval
from vllm_entropix.bench.summary import Arm, Comparison, ModelSummary, Summary
from vllm_entropix.bench.tasks import KINDS

UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        title: of it.
        head: names of the columns.
        rows: texts.
        notes: sentences below it.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """As Markdown, with the title as a heading."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = "|" + "---|" * len(self.head)
        return "\n".join([f"### {self.title}", "", line(self.head), rule, *map(line, self.rows), "", *self.notes]).rstrip()


def percent(value: float) -> str:
    """A share, in per cent."""
    return UNKNOWN if math.isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of shares, in points."""
    return UNKNOWN if math.isnan(value) else f"{100 * value:+.1f}"


def interval(of: Interval, shown: Callable[[float], str] = percent) -> str:
    """An estimate with its interval."""
    return UNKNOWN if math.isnan(of.value) else f"{shown(of.value)} ({shown(of.low)} to {shown(of.high)})"


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}f}"


def p_value(value: float) -> str:
    """A p-value."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def accuracy(model: ModelSummary) -> Table:
    """Accuracy of one draw, by task."""
    tasks = list(dict.fromkeys(task for arm in model.arms for task in arm.by_task))
    rows = [
        (
            arm.sampler,
            interval(arm.accuracy),
            *(interval(arm.by_task[task]) if task in arm.by_task else UNKNOWN for task in tasks),
        )
        for arm in model.arms
    ]
    notes = tuple(f"{task}: no sampler is right often enough for this task to tell anything." for task in model.too_hard)
    return Table(f"Accuracy of one draw, {model.model}, per cent", ("sampler", "mean over tasks", *tasks), rows, notes)


def draws(model: ModelSummary) -> Table:
    """Several draws: quality and diversity."""
    rows = [
        (
            arm.sampler,
            percent(arm.accuracy.value),
            percent(arm.pass_at),
            percent(arm.majority),
            number(arm.distinct),
            number(arm.distinct_open, 3),
            UNKNOWN if arm.as_greedy is None else percent(arm.as_greedy),
            percent(arm.cut),
            number(arm.tokens, 1),
        )
        for arm in model.arms
    ]
    head = (
        "sampler", "one draw", "pass@5", "majority of 5", "different answers of 5", "different 4-grams, open prompts",
        "word for word greedy", "cut by the limit", "tokens",
    )  # fmt: skip
    imitating = [arm.sampler for arm in model.arms if arm.imitates_greedy]
    notes = (
        (f"More than nine in ten draws of {', '.join(imitating)} are greedy's own: greedy is imitated.",) if imitating else ()
    )
    return Table(f"Quality and diversity of five draws, {model.model}", head, rows, notes)


def comparisons(summary: Summary) -> Table:
    """All paired differences."""
    rows = [
        (
            one.model,
            one.sampler,
            one.against,
            interval(one.difference, points),
            p_value(one.p),
            p_value(one.holm),
            _verdict(one),
            UNKNOWN if one.mcnemar is None else f"{one.mcnemar.first} : {one.mcnemar.second}, p {p_value(one.mcnemar.p)}",
            number(one.tokens),
        )
        for one in summary.comparisons
    ]
    head = (
        "model", "sampler", "against", "difference, points", "p", "p after Holm", "", "McNemar, first draws", "its tokens",
    )  # fmt: skip
    notes = (
        f"Paired by item, the mean over tasks, {summary.study.resamples:,} resamples; Holm's correction is over all "
        f"{len(rows)} rows. The last column: tokens of the other for one of the sampler's.",
    )
    return Table("Paired differences", head, rows, notes)


def _verdict(one: Comparison) -> str:
    if one.holm >= 0.05:
        return "no difference shown"
    return "better" if one.difference.value > 0 else "worse"


def differences_by_task(summary: Summary) -> Table:
    """Paired differences on each task, without tests."""
    tasks = list(dict.fromkeys(task for one in summary.comparisons for task in one.by_task))
    rows = [
        (
            one.model,
            one.sampler,
            one.against,
            *(interval(one.by_task[t], points) if t in one.by_task else UNKNOWN for t in tasks),
        )
        for one in summary.comparisons
    ]
    return Table("Paired differences by task, points", ("model", "sampler", "against", *tasks), rows)


def tuning(model: ModelSummary) -> Table:
    """What tuning bought."""
    rows = []
    for tuned in model.tuned:
        best = tuned.best_of
        rows.append(
            (
                tuned.sampler,
                str(len(best)),
                percent(best[0]),
                percent(best[min(4, len(best) - 1)]),
                percent(best[-1]),
                _parameters(next((arm for arm in model.arms if arm.sampler == tuned.sampler), None)),
            )
        )
    head = ("sampler", "configurations", "mean", "expected best of 5", "best", "chosen")
    return Table(f"Tuning split, {model.model}, per cent", head, rows)


def _parameters(arm: Arm | None) -> str:
    if arm is None:
        return UNKNOWN
    return ", ".join(f"{name} {value}" for name, value in arm.parameters.items()) or "nothing"


def temperatures(model: ModelSummary) -> Table:
    """What samplers that were measured did."""
    shares = sorted({name for arm in model.arms for name in arm.signals if name.startswith("share_")})
    rows = [
        (
            arm.sampler,
            number(arm.signals.get("temperature_mean")),
            *(percent(arm.signals.get(name, math.nan)) for name in shares),
        )
        for arm in model.arms
        if "temperature_mean" in arm.signals
    ]
    head = ("sampler", "mean temperature", *(f"{name.removeprefix('share_')}, per cent" for name in shares))
    return Table(f"Temperatures and regimes, {model.model}", head, rows, ("Means over answers, of tokens that aren't argmax.",))


def forks(model: ModelSummary) -> Table:
    """How often answers forked."""
    rows = [(arm.sampler, number(arm.signals["forks"]), number(arm.tokens, 1)) for arm in model.arms if "forks" in arm.signals]
    notes = ("Means over answers. Tokens are those of all branches, pruned ones included.",)
    return Table(f"Answers that fork, {model.model}", ("sampler", "forks", "tokens"), rows, notes)


def signals(model: ModelSummary) -> Table:
    """AUROC of every signal, over all tasks and on each."""
    tasks = list(dict.fromkeys(one.task for one in model.signals))
    rows = []
    for sampler in dict.fromkeys(one.sampler for one in model.signals):
        of_sampler = {(one.signal, one.task): one for one in model.signals if one.sampler == sampler}
        for signal in dict.fromkeys(name for name, _ in of_sampler):
            cells = [
                interval(of_sampler[signal, task].auroc, decimals) if (signal, task) in of_sampler else UNKNOWN
                for task in tasks
            ]
            rows.append((sampler, signal, *cells, _over(of_sampler.get((signal, ALL)))))
    notes = (
        "0.5 is chance. Last column: the difference to perplexity, which plain log-probabilities tell, on the same answers.",
    )
    head = ("answers of", "signal", *tasks, "over log-probabilities")
    return Table(f"AUROC of signals, wrong against right answers, {model.model}", head, rows, notes)


def decimals(value: float) -> str:
    """A number with two decimals."""
    return number(value)


def _over(one: Told | None) -> str:
    if one is None or one.over_control is None:
        return UNKNOWN
    better = "" if one.over_control.low > 0 or one.over_control.high < 0 else ": no better"
    return f"{interval(one.over_control, '{:+.2f}'.format)}{better}"


def tasks(summary: Summary) -> Table:
    """What was asked, and by which rule answers were taken out."""
    study = summary.study
    rows = [
        (
            name,
            one.kind,
            str(one.tuning),
            str(one.test),
            str(one.answer_tokens),
            KINDS[one.kind].rule or "Nothing is right or wrong.",
        )
        for name, one in study.tasks.items()
    ]
    return Table("Tasks", ("task", "kind", "tuning items", "test items", "tokens at most", "rule"), rows)


def all_tables(summary: Summary) -> list[Table]:
    """All of them, in the report's order."""
    found = [comparisons(summary)] if summary.comparisons else []
    for model in summary.models:
        if model.arms:
            found += [accuracy(model), draws(model)]
    if summary.comparisons:
        found.append(differences_by_task(summary))
    for model in summary.models:
        found += [one for one in (signals(model), tuning(model), temperatures(model), forks(model)) if one.rows]
    return [*found, tasks(summary)]
