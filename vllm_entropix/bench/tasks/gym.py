"""Families of reasoning-gym: generated problems with verifiers of their own."""

from __future__ import annotations

import random
from importlib import import_module
from typing import Any

from pydantic import Field

from vllm_entropix.bench.extract import last_line
from vllm_entropix.bench.tasks.base import Graded, Item, Task
from vllm_entropix.settings.errors import ConfigError, cut, quoted
from vllm_entropix.settings.section import Section


class GymOptions(Section):
    """Which family, and how hard."""

    family: str = Field(description="Name of the data set, such as chain_sum.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Of the data set's configuration.")


class Gym(Task[GymOptions]):
    """A family of reasoning-gym, judged by its own verifier."""

    kind = "reasoning_gym"
    Options = GymOptions
    max_tokens = 256
    rule = (
        'What stands in the last <answer> tag, or behind the last "answer:" or "answer is" on its line, and otherwise the last '
        "line; right if the family's verifier gives it the full score."
    )

    def items(self, count: int, seed: str) -> list[Item]:
        """Problems of the family's generator."""
        found = self._create(size=count, seed=random.Random(seed).randrange(2**31))
        return [
            Item(
                f"{n:04}",
                f'{entry["question"]}\n\nThink step by step, and end with the line "Answer:" and the answer alone.',
                dict(entry),
            )
            for n, entry in enumerate(found[index] for index in range(count))
        ]

    def grade(self, item: Item, text: str) -> Graded:
        """Ask the family's verifier."""
        found = last_line(text)
        if found is None:
            return Graded(None, False)
        score = self._create(size=1, seed=0).score_answer(answer=found, entry=item.expected)
        return Graded(found, float(score) >= 1)

    def _create(self, **arguments: Any) -> Any:
        try:
            gym = import_module("reasoning_gym")
        except ImportError:
            raise ConfigError(
                f"the task {self.kind} needs the package reasoning-gym; install it with pip install reasoning-gym"
            ) from None
        try:
            return gym.create_dataset(self.options.family, **self.options.parameters, **arguments)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"reasoning-gym can't make the family {quoted(self.options.family)}: {cut(str(error))}") from None
