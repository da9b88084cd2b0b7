"""What a task is: items with a question each, and how an answer to one is judged."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from vllm_entropix.settings.errors import ConfigError
from vllm_entropix.settings.section import Section


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        id: within the task; the same seed and options give the same items under the same ids.
        question: what the model is asked.
        expected: what its answer is compared with; None where nothing is right or wrong. It can be pickled.
    """

    id: str
    question: str
    expected: Any = None


@dataclass(frozen=True, slots=True)
class Graded:
    """What became of one answer.

    Attributes:
        answer: what the task's rule took out of the text; None if there was nothing to take.
        correct: whether it is right; None where nothing is right or wrong.
        note: why it couldn't be judged as usual; empty otherwise.
    """

    answer: str | None
    correct: bool | None
    note: str = ""


class NoOptions(Section):
    """A task without options."""


OptionsT = TypeVar("OptionsT", bound=Section)


class Task(ABC, Generic[OptionsT]):
    """A kind of task.

    Attributes:
        kind: what a study file calls it.
        Options: what a study file may set of it.
        max_tokens: of an answer, where the study file gives none.
        rule: how an answer is taken out of a text, in one sentence; an empty one: it isn't.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[Section]] = NoOptions
    max_tokens: ClassVar[int] = 160
    rule: ClassVar[str]

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @abstractmethod
    def items(self, count: int, seed: str) -> list[Item]:
        """So many different items; a larger count begins with those of a smaller one.

        Raises:
            ConfigError: there aren't so many.
        """

    @abstractmethod
    def grade(self, item: Item, text: str) -> Graded:
        """Judge an answer. It may take long, or fail: :class:`~vllm_entropix.bench.grading.Grader` sets limits."""


def chosen(kind: str, universe: list[Item], count: int, seed: str) -> list[Item]:
    """The first of a list in random order.

    Raises:
        ConfigError: the list is shorter.
    """
    if count > len(universe):
        raise ConfigError(f"the task {kind} has {len(universe)} items, but the study asks for {count} of them; ask for fewer")
    shuffled = list(universe)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


def generated(kind: str, make: Callable[[random.Random], tuple[str, Any]], count: int, seed: str) -> list[Item]:
    """Items of a generator, each question once.

    Args:
        kind: of the task.
        make: a question and what is expected.
        count: how many.
        seed: of the generator.

    Raises:
        ConfigError: the generator makes too few different ones.
    """

    def different() -> Iterator[Item]:
        rng, seen, vain = random.Random(seed), set(), 0
        while vain < 1000:
            question, expected = make(rng)
            if question in seen:
                vain += 1
                continue
            seen.add(question)
            vain = 0
            yield Item(f"{len(seen) - 1:04}", question, expected)

    items = [item for item, _ in zip(different(), range(count), strict=False)]
    if len(items) < count:
        raise ConfigError(
            f"the task {kind} makes {len(items)} different items with these options, but the study asks for {count}; "
            "ask for fewer, or widen the options"
        )
    return items
