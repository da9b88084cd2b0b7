"""Which configuration of each sampler was best on the tuning split."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_entropix.bench.answers import Answer
from vllm_entropix.bench.study import Study, Value
from vllm_entropix.samplers.entropix.settings import SHARED
from vllm_entropix.settings.errors import ConfigError

_PREFIX, _CONSTANTS = "entropix_", "entropix_constants"
_FILTERS = ("top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The configuration of a sampler that runs on the test split.

    Attributes:
        configuration: which one.
        parameters: its parameters.
        accuracy: on the tuning split; None for what isn't tuned.
    """

    configuration: int
    parameters: dict[str, Value]
    accuracy: float | None


def accuracies(answers: Iterable[Answer]) -> dict[str, dict[int, float]]:
    """Accuracy of each configuration of each sampler: the mean over tasks, by one model's answers of one phase."""
    right: defaultdict[tuple[str, int], defaultdict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        if answer.correct is not None:
            right[answer.sampler, answer.configuration][answer.task].append(answer.correct)
    found: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for (sampler, configuration), by_task in right.items():
        means = [sum(task) / len(task) for task in by_task.values()]
        found[sampler][configuration] = sum(means) / len(means)
    return found


def choose(study: Study, answers: Iterable[Answer]) -> dict[str, Chosen]:
    """The chosen configuration of every sampler, of equally good ones the first; none of those that weren't tuned yet.

    Args:
        study: whose samplers they are.
        answers: all of one model's to the tuning split.

    Raises:
        ConfigError: a control follows a mean temperature, or shares of regimes, that no answer tells.
    """
    tuning = list(answers)
    by_sampler = accuracies(tuning)
    chosen: dict[str, Chosen] = {}
    own = {name: arm for name, arm in study.samplers.items() if arm.control_of is arm.majority_of is None}
    # Those that fork as often as another come after it.
    for name in sorted(own, key=lambda name: own[name].as_many_forks_as is not None):
        arm, scores = own[name], by_sampler.get(name, {})
        if arm.as_many_forks_as in chosen:
            wanted = _forks(tuning, arm.as_many_forks_as, chosen[arm.as_many_forks_as].configuration)
            differences = {one: abs(_forks(tuning, name, one) - wanted) for one in sorted(scores)}
            best = min(differences, key=differences.__getitem__, default=0)
        else:
            best = max(sorted(scores), key=lambda configuration: scores[configuration], default=0)
        if scores or not arm.ranges:
            chosen[name] = Chosen(best, study.parameters(name)[best], scores.get(best))
    for name, arm in study.samplers.items():
        if arm.control_of not in chosen:
            continue
        assert arm.control_of is not None
        other = chosen[arm.control_of]
        followed = [one for one in tuning if (one.sampler, one.configuration) == (arm.control_of, other.configuration)]
        if arm.as_tuned is not None:
            parameters = {**other.parameters, **arm.fixed}
            if arm.with_shares:
                parameters[_CONSTANTS] = _shares(name, arm.as_tuned, followed)
            chosen[name] = Chosen(0, parameters, None)
        elif arm.mean_temperature_of is not None:
            temperature = _mean_temperature(followed)
            if temperature is None:
                raise ConfigError(
                    f"samplers.{name} takes the mean temperature of {arm.mean_temperature_of}, but no answer of the tuning "
                    "split tells any; give a task a tuning split, or leave this control out"
                )
            chosen[name] = Chosen(0, {**_filters(other.parameters), "temperature": temperature, **arm.fixed}, None)
    return chosen


def _forks(answers: Iterable[Answer], sampler: str, configuration: int) -> float:
    """Forks of a configuration's answer, on average; 0 where none is told."""
    of = [one.signals.get("forks", 0.0) for one in answers if (one.sampler, one.configuration) == (sampler, configuration)]
    return sum(of) / len(of) if of else 0.0


def _shares(control: str, other: str, answers: Iterable[Answer]) -> str:
    """Constants with the shares that regimes had among the tokens of these answers, as a request gives them."""
    known = [
        (one.tokens, one.signals) for one in answers if one.tokens and all(f"share_{name}" in one.signals for name in SHARED)
    ]
    if not known:
        raise ConfigError(
            f"samplers.{control} takes the shares of regimes of {other}, but no answer of the tuning split tells any; give a "
            "task a tuning split, or leave this control out"
        )
    tokens = sum(count for count, _ in known)
    shares = {name: sum(count * told[f"share_{name}"] for count, told in known) / tokens for name in SHARED}
    return json.dumps({f"experiments.shares.{name}": float(f"{share:.4g}") for name, share in shares.items()})


def _filters(parameters: Mapping[str, Value]) -> dict[str, Value]:
    """Base filters of a sampler of ours, as plain parameters of a request."""
    plain = {name.removeprefix(_PREFIX): value for name, value in parameters.items()}
    return {name: plain[name] for name in _FILTERS if name in plain}


def _mean_temperature(answers: Iterable[Answer]) -> float | None:
    """Over the tokens that aren't argmax."""
    weighted = tokens = 0.0
    for answer in answers:
        mean = answer.signals.get("temperature_mean")
        if mean is not None:
            warm = answer.tokens * (1 - answer.signals.get("share_argmax", 0.0))
            weighted += mean * warm
            tokens += warm
    return float(f"{weighted / tokens:.4g}") if tokens else None
