"""Which branch is best: choosers score branches side by side, and the highest score wins.

An entry point of the group ``vllm_entropix.choosers`` names a function of the kind of :data:`Chooser`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import entry_points
from statistics import fmean

from vllm_entropix.forks.answers import Rule, normalised
from vllm_entropix.settings.errors import ConfigError, cut, quoted

logger = logging.getLogger(__name__)

GROUP = "vllm_entropix.choosers"


@dataclass(frozen=True)
class Contender:
    """A branch as a chooser sees it.

    Attributes:
        branch: its number; 0 is the one that the request began.
        token_ids: the answer so far, from its first token on.
        start: tokens that all contenders share.
        stop: where the comparison ends.
        logprobs: natural logarithm of the probability of each token from ``start`` to ``stop``, before temperature and filters;
            None where it isn't known.
        entropies: the distributions' entropies in bits, in the same way.
        margins: the most probable token's probability less the second's, in the same way.
        finished: has it run to its end?
        text: gives the text so far.
        pieces: gives the text of each token.
        rule: finds the answer in a text; None: the request names no rule.
    """

    branch: int
    token_ids: Sequence[int]
    start: int
    stop: int
    logprobs: Sequence[float | None]
    entropies: Sequence[float | None]
    margins: Sequence[float | None]
    finished: bool
    text: Callable[[], str] = field(repr=False, compare=False)
    pieces: Callable[[], Sequence[str]] = field(default=lambda: (), repr=False, compare=False)
    rule: Rule | None = field(default=None, repr=False, compare=False)

    @cached_property
    def answer(self) -> str | None:
        """The answer in its text as answers are compared, see :func:`~.answers.normalised`; None: there is none."""
        text = self.text()
        span = None if self.rule is None else self.rule(text)
        return None if span is None else normalised(text[slice(*span)])

    @cached_property
    def of_answer(self) -> list[int]:
        """Which tokens from ``start`` to ``stop`` are the answer's, counted from ``start``; none where there is no answer."""
        pieces = list(self.pieces())
        span = None if self.rule is None else self.rule("".join(pieces))
        if span is None:
            return []
        found, end = [], 0
        for place, piece in enumerate(pieces):
            begin, end = end, end + len(piece)
            if self.start <= place < self.stop and begin < span[1] and end > span[0]:
                found.append(place - self.start)
        return found


# Contenders → a score for each; NaN loses.
Chooser = Callable[[Sequence[Contender]], Sequence[float]]


def confidence(contenders: Sequence[Contender]) -> list[float]:
    """Mean log-probability of the tokens."""
    return [_mean(contender.logprobs) for contender in contenders]


def entropy(contenders: Sequence[Contender]) -> list[float]:
    """Least mean entropy."""
    return [-_mean(contender.entropies, math.inf) for contender in contenders]


def margin(contenders: Sequence[Contender]) -> list[float]:
    """Mean lead of the most probable token over the second: of the answer's tokens, if a rule finds some, or of all."""
    if not any(contender.of_answer for contender in contenders):
        return [_mean(contender.margins) for contender in contenders]
    return [_mean([contender.margins[place] for place in contender.of_answer]) for contender in contenders]


def vote(contenders: Sequence[Contender]) -> list[float]:
    """Branches that give the same answer, and half the mean probability of a token: of those the most confident is first."""
    return _voted(contenders, [1.0] * len(contenders), 0.5)


def weighted_vote(contenders: Sequence[Contender]) -> list[float]:
    """The same, where a branch counts as much as its tokens' mean probability."""
    return _voted(contenders, [_probability(contender) for contender in contenders], 1e-6)


def _voted(contenders: Sequence[Contender], weights: Sequence[float], of_own: float) -> list[float]:
    answers = [contender.answer for contender in contenders]
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    if not votes:
        return confidence(contenders)
    return [
        -math.inf if answer is None else votes[answer] + of_own * _probability(contender)
        for answer, contender in zip(answers, contenders, strict=True)
    ]


def _probability(contender: Contender) -> float:
    """Of a token, the geometric mean; 0 where nothing is known."""
    return math.exp(_mean(contender.logprobs))


# All branches are the answer, the most confident first.
ALL = "all"
BUILT_IN: dict[str, Chooser] = {
    "confidence": confidence,
    "entropy": entropy,
    "margin": margin,
    "vote": vote,
    "weighted-vote": weighted_vote,
    ALL: confidence,
}
# These compare whole answers, so there is no horizon for them.
OF_WHOLE_ANSWERS = frozenset({"vote", "weighted-vote", ALL})
# These need a rule that finds answers.
OF_ANSWERS = frozenset({"vote", "weighted-vote"})


def chooser(name: str) -> Chooser:
    """The chooser of a name.

    Raises:
        ConfigError: there is none, or it can't be loaded.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    found = _of_others()
    if name not in found:
        raise ConfigError(f"there is no chooser {quoted(name)}; there are {', '.join([*BUILT_IN, *sorted(found)])}")
    loaded = found[name]
    if isinstance(loaded, str):
        raise ConfigError(loaded)
    return loaded


@cache
def _of_others() -> dict[str, Chooser | str]:
    """Choosers that other packages register, or why one can't be used, once a process."""
    found: dict[str, Chooser | str] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        package = entry.dist.name if entry.dist is not None else entry.value
        try:
            if entry.name in BUILT_IN:
                raise ValueError("there is another of this name")
            loaded = entry.load()
            if not callable(loaded):
                raise TypeError(f"{quoted(loaded)} is no function")
            found[entry.name] = loaded
        except (Exception, SystemExit) as error:  # a module that ends its process would end everybody's
            reason = cut(" ".join(str(error).split()) or type(error).__name__, 300)
            problem = f"the chooser {entry.name} of the package {package} can't be used: {reason}"
            logger.warning("vllm-entropix: %s", problem)
            if entry.name not in BUILT_IN:
                found[entry.name] = problem
    return found


def scores_of(chosen_by: Chooser, contenders: Sequence[Contender]) -> list[float]:
    """A chooser's scores, as numbers that compare: one per contender, NaN being less than any.

    Raises:
        ValueError: it gave another number of scores, or something else.
    """
    scores = [float(score) for score in chosen_by(contenders)]
    if len(scores) != len(contenders):
        raise ValueError(f"a chooser gave {len(scores)} scores for {len(contenders)} branches")
    return [-math.inf if math.isnan(score) else score for score in scores]


def _mean(values: Sequence[float | None], unknown: float = -math.inf) -> float:
    known = [value for value in values if value is not None]
    if not known:
        return unknown
    return -math.inf if -math.inf in known else fmean(known)
