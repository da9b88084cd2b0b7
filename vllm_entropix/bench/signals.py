"""How well each signal tells a study's wrong answers from its right ones, beside plain log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_entropix.bench.answers import Answer
from vllm_entropix.bench.statistics import Interval
from vllm_entropix.observability import selective
from vllm_entropix.records.scores import BY_NAME, CONTROL

# Of the bootstrap: figures of many signals and tasks are computed, and none of them is tested.
RESAMPLES = 1000
ALL = "all tasks"


@dataclass(frozen=True, slots=True)
class Told:
    """What a signal is worth.

    Attributes:
        signal: its name.
        sampler: whose answers these are.
        task: name of the task, or ALL.
        auroc: probability that it doubts a wrong answer more than a right one.
        over_control: AUROC less that of the answers' perplexity, on the same answers; None of perplexity itself.
        answers: that it is known of.
        wrong: of these.
    """

    signal: str
    sampler: str
    task: str
    auroc: Interval
    over_control: Interval | None
    answers: int
    wrong: int


def told(answers: Sequence[Answer], sampler: str, seed: int) -> list[Told]:
    """What all signals are worth on a sampler's answers, over all tasks and on each. Tasks all right or all wrong are left out.

    Args:
        answers: to tasks with right answers.
        sampler: whose they are.
        seed: of the bootstrap, which draws items.
    """
    found = []
    for task in (ALL, *dict.fromkeys(answer.task for answer in answers)):
        chosen = [one for one in answers if task in (ALL, one.task) and CONTROL in one.signals and one.correct is not None]
        if len({one.correct for one in chosen}) == 2:
            found += _of_task(chosen, sampler, task, seed)
    return found


def _of_task(answers: Sequence[Answer], sampler: str, task: str, seed: int) -> list[Told]:
    items = {name: number for number, name in enumerate(dict.fromkeys((one.task, one.item) for one in answers))}
    wrong = np.array([not one.correct for one in answers])
    of_items = np.array([items[one.task, one.item] for one in answers])

    def auroc(signal: str) -> tuple[Interval, np.ndarray]:
        sign = -1 if BY_NAME[signal].doubtful == "low" else 1
        doubts = sign * np.array([one.signals[signal] for one in answers])
        value, resampled = selective.Answers(doubts, wrong, of_items, RESAMPLES, seed).auroc()
        return _interval(value), resampled

    # On the same answers, or a difference would be one of answers.
    common = [name for name in BY_NAME if all(name in one.signals and math.isfinite(one.signals[name]) for one in answers)]
    control, of_control = auroc(CONTROL)
    found = []
    for name in common:
        value, resampled = (control, of_control) if name == CONTROL else auroc(name)
        over = selective.Interval.of(value.value - control.value, resampled - of_control) if name != CONTROL else None
        found.append(
            Told(name, sampler, task, value, None if over is None else _interval(over), len(answers), int(wrong.sum()))
        )
    return sorted(found, key=lambda one: -one.auroc.value)


def _interval(of: selective.Interval) -> Interval:
    return Interval(of.value, of.low, of.high)
