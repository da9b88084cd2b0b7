"""What a stage of a chain is: it is handed the candidates that are left, and drops some or moves their logits.

Stages are the llama.cpp family of samplers, one file each in this folder. Like every sampler's, their modules don't import
torch when they are loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vllm_entropix.settings.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_entropix.distribution.attention import AttentionStatistics
    from vllm_entropix.distribution.constants import Constants
    from vllm_entropix.records.fields import Field
    from vllm_entropix.settings.server import ServerSettings

__all__ = ["Branch", "Stage", "StageRows", "StatefulStage"]

# (share of the probability ``[rows, 1]``, logits of what is left ``[rows, vocab]``)
Branch = tuple["Tensor", "Tensor"]


@dataclass(frozen=True)
class StageRows:
    """What a stage may look at beside the logits.

    Attributes:
        numbers: value of each setting, ``[rows, 1]``, by its name.
        tokens: int64 ``[rows, length]``, each row's prompt and answer up to here, aligned to the right; -1 stands before the
            first. None: no stage of the chain looks at it.
        state: ``[rows, 1]``, what a :class:`StatefulStage` keeps; None for others.
        constants: each row's numbers of entropix, for it alone; None: those of its settings.
        server: the server's settings; None in a notebook.
        measure: gives attention statistics of a bool mask of rows, for entropix alone; None: there are none to be had.
    """

    numbers: Mapping[str, Tensor]
    tokens: Tensor | None = None
    state: Tensor | None = None
    constants: Constants | None = None
    server: ServerSettings | None = None
    measure: Callable[[Tensor], AttentionStatistics | None] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.numbers[name]

    def with_text_of(self, part: slice) -> StageRows:
        """Numbers and tokens of some of the rows."""
        numbers = {name: values[part] for name, values in self.numbers.items()}
        return StageRows(numbers, None if self.tokens is None else self.tokens[part])


class Stage(ABC):
    """One stage of a chain.

    Attributes:
        name: in chains.
        aliases: what else people call it.
        Settings: its settings, under llama.cpp's names, which requests use, too.
        setting_aliases: (what else people call a setting, its name).
        chain_defaults: (setting, default) in a chain, where they aren't those of :attr:`Settings`.
        needs_tokens: does it look at :attr:`StageRows.tokens`?
        window: the setting that says at how many of the last tokens it looks, -1 being all; None: at none, or always at all.
        last: does it end the chain, wherever it is named?
        neutral: (setting, least, greatest): the stage changes nothing if each of these settings lies between the two. Empty:
            no value switches it off.
        fields: what it adds to a record, 0 where it is switched off.

    Args:
        breakers: token ids of each text that ends a repetition, for the stage that asks.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type[Section]]
    setting_aliases: ClassVar[tuple[tuple[str, str], ...]] = ()
    chain_defaults: ClassVar[tuple[tuple[str, Any], ...]] = ()
    needs_tokens: ClassVar[bool] = False
    window: ClassVar[str | None] = None
    last: ClassVar[bool] = False
    neutral: ClassVar[tuple[tuple[str, float, float], ...]] = ()
    fields: ClassVar[tuple[Field, ...]] = ()

    def __init__(self, breakers: Sequence[tuple[int, ...]] = ()) -> None:
        self.breakers = tuple(breakers)

    @classmethod
    def is_off(cls, values: Mapping[str, Any]) -> bool:
        """Does the stage change nothing, with these values of its settings?"""
        return bool(cls.neutral) and all(low <= values[name] <= high for name, low, high in cls.neutral)

    @abstractmethod
    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """Logits ``[rows, vocab]`` of what is left; -inf for what is dropped, now or before. Each row is its own."""

    def branches(self, logits: Tensor, rows: StageRows) -> list[Branch]:
        """What is left, as a mixture: the stages that follow act on each part of it."""
        return [(logits.new_ones(len(logits), 1), self.apply(logits, rows))]

    def told(self, before: Tensor, after: Sequence[Branch], rows: StageRows, drawn: Tensor) -> Mapping[str, Tensor]:
        """The stage's :attr:`fields` of a record, ``[rows]`` each, once the tokens are drawn.

        Args:
            before: logits that the stage was handed; of several parts of a mixture the first.
            after: what it made of them.
            rows: what it looked at.
            drawn: int64 ``[rows, 1]``.
        """
        return {}


class StatefulStage(Stage):
    """A stage that follows what is drawn: one number per row, which the probability of each drawn token moves.

    Attributes:
        follows: is it the drawn token's probability ``before`` the stage or ``after`` it?
    """

    follows: ClassVar[Literal["before", "after"]]

    @abstractmethod
    def initial(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """The state of a row before its first token, in the shape of its numbers."""

    @abstractmethod
    def advance(self, state: Tensor, probability: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """The state after a token of this ``probability`` was drawn; all in the shape of the numbers."""
