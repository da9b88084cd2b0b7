"""What a study found: every figure of its report, computed from the answers alone."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vllm_entropix.bench import statistics
from vllm_entropix.bench.answers import SESSIONS, STUDY, Answer, read
from vllm_entropix.bench.choose import accuracies
from vllm_entropix.bench.signals import Told, told
from vllm_entropix.bench.statistics import Interval, McNemar
from vllm_entropix.bench.study import Study, Value
from vllm_entropix.settings.errors import ConfigError

# Draws of one item that pass@k and the majority are told of.
K = 5
# A sampler with a larger share of draws that are word for word greedy's is said to imitate it.
IMITATES = 0.9
# A task on which the best sampler is right less often says nothing.
TOO_HARD = 0.05
# What a sampler is compared with where the study has a ladder.
EQUAL_TOKENS = "the ladder at equal tokens"


@dataclass(frozen=True, slots=True)
class Arm:
    """A sampler on the test split of a model. What can't be told, for want of answers, is NaN or None.

    Attributes:
        sampler: its name in the study.
        parameters: of the chosen configuration.
        accuracy: the mean over tasks.
        by_task: accuracy on each task.
        pass_at: probability that one of K draws is right; the mean over tasks.
        majority: probability that the most frequent of K draws is right; the mean over tasks.
        distinct: different answers among K draws of an item with a right answer, on average.
        distinct_open: share of different 4-grams of words in an open prompt's draws, on average.
        as_greedy: share of draws that are word for word greedy's; None of greedy itself.
        cut: share of answers that the limit of tokens ended.
        tokens: of an answer, on average.
        signals: means of what was measured of the answers.
        answers: how many there are.
    """

    sampler: str
    parameters: dict[str, Value]
    accuracy: Interval
    by_task: dict[str, Interval]
    pass_at: float
    majority: float
    distinct: float
    distinct_open: float
    as_greedy: float | None
    cut: float
    tokens: float
    signals: dict[str, float]
    answers: int

    @property
    def imitates_greedy(self) -> bool:
        """Are almost all of its answers greedy's?"""
        return self.as_greedy is not None and self.as_greedy > IMITATES


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two samplers of a model on the same items.

    Attributes:
        model: name of the model.
        sampler: which one.
        against: which other.
        difference: of the accuracies, the first less the other.
        by_task: the same on each task.
        p: of the test that there is none.
        holm: p, corrected for all comparisons of the study.
        mcnemar: of the first draws, where the other is greedy.
        tokens: of an answer of the other's, on average over the items, for one of an answer of the sampler's.
    """

    model: str
    sampler: str
    against: str
    difference: Interval
    by_task: dict[str, Interval]
    p: float
    holm: float
    mcnemar: McNemar | None
    tokens: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """A sampler on the tuning split of a model.

    Attributes:
        sampler: its name in the study.
        accuracies: of each configuration.
        best_of: expected best of k configurations, for k = 1 to all.
    """

    sampler: str
    accuracies: dict[int, float]
    best_of: list[float]


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What was found of a model."""

    model: str
    arms: list[Arm]
    tuned: list[Tuned]
    too_hard: list[str]
    signals: list[Told]


@dataclass(frozen=True)
class Summary:
    """What a study found.

    Attributes:
        study: that it was.
        models: by model, in the study's order.
        comparisons: of all models.
        sessions: machines and versions that answers were asked on.
        answers: how many there are.
    """

    study: Study
    models: list[ModelSummary]
    comparisons: list[Comparison]
    sessions: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0


class _Scores:
    """A model's answers to the test split, by sampler, task and item."""

    def __init__(self, study: Study, answers: Iterable[Answer]) -> None:
        self.study = study
        self.by_sampler: defaultdict[str, defaultdict[str, defaultdict[str, list[Answer]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        for answer in sorted(answers, key=lambda one: one.draw):
            self.by_sampler[answer.sampler][answer.task][answer.item].append(answer)
        for name, arm in study.samplers.items():
            if arm.majority_of is not None and arm.majority_of in self.by_sampler:
                self._vote(name, arm.majority_of)

    def _vote(self, sampler: str, voters: str) -> None:
        """Give a sampler the answers that most of another's draws gave, wherever all of those that vote are there."""
        for task, items in self.scored(voters).items():
            for item, draws in items.items():
                known = {answer.draw: answer for answer in draws}
                voted = [
                    _majority(sampler, draw, [known[one] for one in votes])
                    for draw, votes in enumerate(self.study.votes_of(sampler))
                    if all(one in known for one in votes)
                ]
                if voted:
                    self.by_sampler[sampler][task][item] = voted

    def scored(self, sampler: str) -> dict[str, dict[str, list[Answer]]]:
        """Of the tasks with right answers: task → item → draws."""
        return {task: dict(items) for task, items in self.by_sampler[sampler].items() if self.study.is_scored(task)}

    def everything(self, sampler: str) -> list[Answer]:
        """All answers of a sampler."""
        return [answer for items in self.by_sampler[sampler].values() for draws in items.values() for answer in draws]


def _majority(sampler: str, draw: int, votes: Sequence[Answer]) -> Answer:
    """The answer that most of them gave, of equally frequent ones the first; what none was taken out of is no vote.

    It took the tokens of all.
    """
    counts = Counter(one.answer for one in votes if one.answer is not None)
    most = max(counts, key=counts.__getitem__, default=None)  # the first of equals
    said = next(one for one in votes if one.answer == most)
    own = {"sampler": sampler, "draw": draw, "tokens": sum(one.tokens for one in votes), "signals": {}}
    return said.model_copy(update={**own, "parameters": {**said.parameters, "votes": len(votes)}})


def _share(draws: Sequence[Answer]) -> float:
    return sum(bool(answer.correct) for answer in draws) / len(draws)


def _nested_mean(tasks: Iterable[Iterable[float]]) -> float:
    """Mean over tasks of the mean over items; NaN is left out."""
    known = [[value for value in task if not math.isnan(value)] for task in tasks]
    means = [sum(task) / len(task) for task in known if task]
    return sum(means) / len(means) if means else math.nan


def summarise(folder: Path) -> Summary:
    """Everything that a report shows.

    Raises:
        ConfigError: the folder has no results of a study.
    """
    try:
        study = Study.model_validate(json.loads((folder / STUDY).read_text(encoding="utf-8"))["study"])
    except OSError as error:
        raise ConfigError(f"{folder} has no {STUDY} ({error.strerror}); give the folder that a study wrote") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder / STUDY} isn't what a study wrote; run the study anew into another folder") from None
    answers = list(read(folder))
    models, pairs, by_model = [], [], []
    for model in study.models:
        own = [answer for answer in answers if answer.model == model]
        if not own:
            continue
        scores = _Scores(study, (answer for answer in own if answer.phase == "test"))
        arms = [_arm(scores, name) for name in study.samplers if name in scores.by_sampler]
        tuned = [
            Tuned(name, by_configuration, statistics.expected_best(list(by_configuration.values())))
            for name, by_configuration in accuracies(one for one in own if one.phase == "tuning").items()
        ]
        signals = [
            one
            for name in study.compared_with
            if name in scores.by_sampler
            for one in told([answer for answer in scores.everything(name) if study.is_scored(answer.task)], name, study.seed)
        ]
        models.append(ModelSummary(model, arms, tuned, _too_hard(arms), signals))
        pairs += [(scores, model, sampler, against) for sampler, against in _pairs(study, scores)]
        by_model.append((scores, model))
    compared = [_compare(*pair) for pair in pairs]
    compared += [one for scores, model in by_model for one in _at_equal_tokens(scores, model)]
    corrected = statistics.holm([one.p for one in compared])
    comparisons = [replace(one, holm=holm) for one, holm in zip(compared, corrected, strict=True)]
    return Summary(study, models, comparisons, _sessions(folder), len(answers))


def _arm(scores: _Scores, sampler: str) -> Arm:
    study = scores.study
    tasks, everything = scores.scored(sampler), scores.everything(sampler)
    shares = {task: np.array([_share(draws) for draws in items.values()]) for task, items in tasks.items()}
    by_task = {task: statistics.mean([of], study.resamples, study.seed) for task, of in shares.items()}
    whole = (
        statistics.mean(list(shares.values()), study.resamples, study.seed)
        if shares
        else Interval(math.nan, math.nan, math.nan)
    )
    once = study.samplers[sampler].is_greedy  # its draws are all the same, so one stands for K

    def per_item(of: Any) -> float:
        return _nested_mean([of(draws) for draws in items.values()] for items in tasks.values())

    def passed(draws: list[Answer]) -> float:
        if once:
            return _share(draws)
        return statistics.pass_at(K, sum(bool(one.correct) for one in draws), len(draws)) if len(draws) >= K else math.nan

    def voted(draws: list[Answer]) -> float:
        if len(draws) < K and not once:
            return math.nan
        first = draws[:K]
        return statistics.majority([one.answer for one in first], [bool(one.correct) for one in first])

    def different(draws: list[Answer]) -> float:
        return statistics.distinct(one.answer for one in draws[:K]) if len(draws) >= K or once else math.nan

    open_prompts = [items for task, items in scores.by_sampler[sampler].items() if not study.is_scored(task)]
    return Arm(
        sampler=sampler,
        parameters=everything[0].parameters,
        accuracy=whole,
        by_task=by_task,
        pass_at=per_item(passed),
        majority=per_item(voted),
        distinct=per_item(different),
        distinct_open=_nested_mean(
            [
                statistics.distinct_ngrams([one.text for one in draws]) if len(draws) > 1 else math.nan
                for draws in items.values()
            ]
            for items in open_prompts
        ),
        as_greedy=_as_greedy(scores, sampler),
        cut=sum(one.finish_reason == "length" for one in everything) / len(everything),
        tokens=sum(one.tokens for one in everything) / len(everything),
        signals=_means(everything),
        answers=len(everything),
    )


def _as_greedy(scores: _Scores, sampler: str) -> float | None:
    """Share of a sampler's draws that are word for word greedy's, over all tasks; None if there is no greedy, or it is it."""
    greedy = next((name for name, arm in scores.study.samplers.items() if arm.is_greedy and name in scores.by_sampler), None)
    if greedy is None or greedy == sampler:
        return None
    same = total = 0
    for task, items in scores.by_sampler[sampler].items():
        for item, draws in items.items():
            known = scores.by_sampler[greedy][task].get(item)
            if known:
                same += sum(one.text == known[0].text for one in draws)
                total += len(draws)
    return same / total if total else None


def _means(answers: Sequence[Answer]) -> dict[str, float]:
    values: defaultdict[str, list[float]] = defaultdict(list)
    for answer in answers:
        for name, value in answer.signals.items():
            if math.isfinite(value):
                values[name].append(value)
    return {name: sum(of) / len(of) for name, of in values.items()}


def _too_hard(arms: Sequence[Arm]) -> list[str]:
    """Tasks that no sampler gets right often enough to say anything."""
    best: defaultdict[str, float] = defaultdict(float)
    for arm in arms:
        for task, accuracy in arm.by_task.items():
            best[task] = max(best[task], accuracy.value)
    return [task for task, value in best.items() if value < TOO_HARD]


def _pairs(study: Study, scores: _Scores) -> Iterable[tuple[str, str]]:
    """(sampler, against) of all comparisons of a model, each pair once."""
    seen: set[frozenset[str]] = set()
    for against in study.compared_with:
        for sampler in study.samplers:
            pair = frozenset((sampler, against))
            if len(pair) == 2 and pair not in seen and pair <= scores.by_sampler.keys():
                seen.add(pair)
                yield sampler, against


@dataclass(frozen=True, slots=True)
class _OfItems:
    """A sampler, or a mixture of two, on each item: task → item → a number.

    Attributes:
        right: share of right draws.
        tokens: of an answer, on average.
    """

    right: dict[str, dict[str, float]]
    tokens: dict[str, dict[str, float]]


def _of_items(scores: _Scores, sampler: str) -> _OfItems:
    tasks = scores.scored(sampler)
    return _OfItems(
        {task: {item: _share(draws) for item, draws in items.items()} for task, items in tasks.items()},
        {
            task: {item: sum(one.tokens for one in draws) / len(draws) for item, draws in items.items()}
            for task, items in tasks.items()
        },
    )


def _compare(scores: _Scores, model: str, sampler: str, against: str) -> Comparison:
    study = scores.study
    compared = _difference(study, model, sampler, against, _of_items(scores, sampler), _of_items(scores, against))
    if not (study.samplers[against].is_greedy or study.samplers[sampler].is_greedy):
        return compared
    ours, theirs = scores.scored(sampler), scores.scored(against)
    both = [(task, item) for task, items in ours.items() for item in items if item in theirs.get(task, {})]
    first = [[bool(of[task][item][0].correct) for task, item in both] for of in (ours, theirs)]
    return replace(compared, mcnemar=statistics.mcnemar(*first))


def _difference(study: Study, model: str, sampler: str, against: str, ours: _OfItems, theirs: _OfItems) -> Comparison:
    """The comparison on the items that both answered."""
    differences: dict[str, np.ndarray] = {}
    own = others = 0.0
    for task, items in ours.right.items():
        both = [item for item in items if item in theirs.right.get(task, {})]
        if both:
            differences[task] = np.array([items[item] - theirs.right[task][item] for item in both])
            own += sum(ours.tokens[task][item] for item in both)
            others += sum(theirs.tokens[task][item] for item in both)
    arrays = list(differences.values())
    return Comparison(
        model,
        sampler,
        against,
        statistics.mean(arrays, study.resamples, study.seed) if arrays else Interval(math.nan, math.nan, math.nan),
        {task: statistics.mean([of], study.resamples, study.seed) for task, of in differences.items()},
        statistics.sign_flip(arrays, study.resamples, study.seed) if arrays else 1.0,
        1.0,
        None,
        others / own if own else math.nan,
    )


def _at_equal_tokens(scores: _Scores, model: str) -> Iterator[Comparison]:
    """Each sampler that isn't of the ladder beside the ladder, at its own number of tokens; none if the ladder isn't whole."""
    study = scores.study
    if not study.ladder or any(name not in scores.by_sampler for name in study.ladder):
        return
    steps = [_of_items(scores, name) for name in study.ladder]
    for sampler in study.samplers:
        if sampler in scores.by_sampler and sampler not in study.ladder:
            ours = _of_items(scores, sampler)
            yield _difference(study, model, sampler, EQUAL_TOKENS, ours, _mixture(steps, ours))


def _mixture(steps: Sequence[_OfItems], like: _OfItems) -> _OfItems:
    """What asks one of two neighbours of a ladder by chance, so that on each task it generates as many tokens as another does.

    Where that generates fewer than the first step, it is that one, and beyond the last it is the last.
    """
    mixed = _OfItems({}, {})
    for task, items in like.tokens.items():
        both = [item for item in items if all(item in step.tokens.get(task, {}) for step in steps)]
        if not both:
            continue
        wanted = sum(items[item] for item in both)
        costs = [sum(step.tokens[task][item] for item in both) for step in steps]
        upper = next((index for index, cost in enumerate(costs) if cost >= wanted), len(costs) - 1)
        lower = max(upper - 1, 0)
        span = costs[upper] - costs[lower]
        weight = min(max((wanted - costs[lower]) / span, 0.0), 1.0) if span > 0 else 1.0
        for name in ("right", "tokens"):
            below, above = (getattr(steps[index], name)[task] for index in (lower, upper))
            getattr(mixed, name)[task] = {item: (1 - weight) * below[item] + weight * above[item] for item in both}
    return mixed


def _sessions(folder: Path) -> list[dict[str, Any]]:
    path = folder / SESSIONS
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, 1000) if line.strip()]


def as_json(value: Any) -> Any:
    """Dataclasses, intervals and NaN as JSON values: what isn't known is null."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Study):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): as_json(of) for name, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(of) for of in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_json(getattr(value, name)) for name in value.__dataclass_fields__}
    return value
