"""Scores of traced answers against labels: which score tells wrong from right, and where to draw the line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vllm_entropix.observability.labels import Label
from vllm_entropix.observability.selective import COVERAGES, Answers, Interval, Threshold
from vllm_entropix.records.line import TraceLine
from vllm_entropix.records.scores import BY_NAME, CONTROL, SCORES
from vllm_entropix.settings.errors import ConfigError, quoted


@dataclass
class Labelled:
    """Answers that have both a trace and a label.

    Attributes:
        values: score → ``[answers]``, NaN where it is null.
        wrong: ``[answers]``.
        items: ``[answers]``, names of the questions that they answer.
        groups: ``[answers]``, what figures are told apart by; None each if by nothing.
        without_label: traces that no label is for.
        without_trace: labels that no trace is for.
    """

    values: dict[str, list[float]] = field(default_factory=lambda: {score.name: [] for score in SCORES})
    wrong: list[bool] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    without_label: int = 0
    without_trace: int = 0

    @classmethod
    def join(cls, lines: Iterable[TraceLine], labels: Mapping[tuple[str, int], Label]) -> Labelled:
        """Put traces and labels together. An answer whose label names no item answers that of its prompt.

        Raises:
            ConfigError: no answer has both, two traces are of one answer, or all answers are right, or all wrong.
        """
        found, seen = cls(), set()
        for line in lines:
            key = line.request_id, line.index
            label = labels.get(key)
            if label is None:
                found.without_label += 1
                continue
            if key in seen:
                raise ConfigError(f"the traces have {quoted(key[0])} index {key[1]} twice; give each answer a name of its own")
            seen.add(key)
            scores = line.answer_scores()
            for name, values in found.values.items():
                value = getattr(scores, name)
                values.append(math.nan if value is None else value)
            found.wrong.append(label.wrong)
            found.items.append(label.item or line.prompt_hash or line.request_id)
            found.groups.append(label.group)
        found.without_trace = len(labels) - len(seen)
        if not seen:
            raise ConfigError("no answer has both a trace and a label; the labels' request_id should be that of the traces")
        if len(set(found.wrong)) == 1:
            state = "wrong" if found.wrong[0] else "right"
            raise ConfigError(
                f"all {len(found.wrong)} labelled answers are {state}, so nothing can be told apart; label others, too"
            )
        return found

    def of_group(self, group: str) -> Labelled:
        """The answers of one group."""
        places = [place for place, of in enumerate(self.groups) if of == group]

        def chosen(values: Sequence[Any]) -> list[Any]:
            return [values[place] for place in places]

        values = {name: chosen(of) for name, of in self.values.items()}
        return Labelled(values, chosen(self.wrong), chosen(self.items), chosen(self.groups))


@dataclass(frozen=True)
class Evaluated:
    """What one score is worth.

    Attributes:
        score: its name.
        answers: that it is known of.
        wrong: of these.
        auroc: probability that it doubts a wrong answer more than a right one.
        over_control: AUROC less that of plain log-probabilities on the same answers; None for these themselves, and where the
            two are known of different answers.
        area: under the risk-coverage curve; less is better.
        risks: share of wrong ones among the answers given, at each of COVERAGES.
        threshold: what was asked for; None: nothing was, or this score can't.
    """

    score: str
    answers: int
    wrong: int
    auroc: Interval
    over_control: Interval | None
    area: Interval
    risks: list[Interval]
    threshold: Threshold | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: what can't be told is null, and the threshold is the score's own value."""
        told: dict[str, Any] = {
            "score": self.score,
            "unit": BY_NAME[self.score].unit,
            "answers": self.answers,
            "wrong": self.wrong,
            "auroc": asdict(self.auroc),
            "auroc_over_log_probabilities": None if self.over_control is None else asdict(self.over_control),
            "area_under_risk_coverage": asdict(self.area),
            "risk_at_coverage": [
                {"coverage": coverage, **asdict(risk)} for coverage, risk in zip(COVERAGES, self.risks, strict=True)
            ],
            "threshold": None,
        }
        if self.threshold is not None:
            name, value = self.bound()
            told["threshold"] = {"entropix_abstain_score": self.score, name: value}
            told["threshold"] |= {key: value for key, value in asdict(self.threshold).items() if key != "doubt"}
        cleaned: dict[str, Any] = _without_nan(told)
        return cleaned

    def bound(self) -> tuple[str, float]:
        """What a request says to abstain by the threshold: key and value."""
        assert self.threshold is not None
        if BY_NAME[self.score].doubtful == "high":
            return "entropix_abstain_above", self.threshold.doubt
        return "entropix_abstain_below", -self.threshold.doubt


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    labelled: Labelled,
    resamples: int,
    seed: int,
    accuracy: float | None = None,
    coverage: float | None = None,
) -> list[Evaluated]:
    """What each score is worth, the best AUROC first. Scores that are unknown of all right or all wrong answers are left out.

    Args:
        labelled: answers.
        resamples: of the bootstrap by item.
        seed: of the bootstrap.
        accuracy: that a threshold is to reach; see :meth:`~.selective.Answers.threshold`.
        coverage: likewise.
    """
    wrong, items = np.array(labelled.wrong), np.unique(labelled.items, return_inverse=True)[1]
    known = {name: np.isfinite(np.array(values)) for name, values in labelled.values.items()}
    answers = {
        name: Answers(_doubts(name, labelled)[here], wrong[here], items[here], resamples, seed)
        for name, here in known.items()
        if len(set(wrong[here].tolist())) == 2
    }
    aurocs = {name: of.auroc() for name, of in answers.items()}
    found = []
    for name, of in answers.items():
        (auroc, resampled), over = aurocs[name], None
        if name != CONTROL and CONTROL in aurocs and (known[name] == known[CONTROL]).all():
            control, of_control = aurocs[CONTROL]
            over = Interval.of(auroc.value - control.value, resampled - of_control)
        here = wrong[known[name]]
        threshold = _threshold(of, accuracy, coverage)
        found.append(Evaluated(name, len(here), int(here.sum()), auroc, over, of.area(), of.risks(), threshold))
    return sorted(found, key=lambda one: -one.auroc.value)


def _doubts(name: str, labelled: Labelled) -> np.ndarray:
    """A score's values, turned so that a greater one is a greater doubt."""
    values = np.array(labelled.values[name])
    return values if BY_NAME[name].doubtful == "high" else -values


def _threshold(answers: Answers, accuracy: float | None, coverage: float | None) -> Threshold | None:
    if accuracy is None and coverage is None:
        return None
    try:
        return answers.threshold(accuracy, coverage)
    except ConfigError:  # another score may reach it
        return None
