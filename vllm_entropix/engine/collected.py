"""What the engine traced for one HTTP request, by choice, until it is told."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vllm_entropix.records.choice import choice_json, choice_values
from vllm_entropix.records.schema import Bound
from vllm_entropix.records.trace import TokenTrace


@dataclass(frozen=True)
class Part:
    """What a response, or a chunk of a stream, tells of one choice.

    Attributes:
        token_ids: that have a record.
        trace: their records; its ``not_kept`` counts tokens so far that have none.
        bound: the setting that left those out.
    """

    token_ids: list[int]
    trace: TokenTrace
    bound: Bound | None

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return choice_values(self.token_ids, self.trace, self.bound)

    def json(self) -> Iterator[bytes]:
        """As JSON, some at a time; other threads run in between."""
        return choice_json(self.token_ids, self.trace, self.bound)


@dataclass
class _Choice:
    """What hasn't been told of a choice, and how many tokens so far have no record."""

    waiting: TokenTrace
    token_ids: list[int] = field(default_factory=list)
    not_kept: int = 0
    bound: Bound | None = None


class Collected:
    """Records of a request's choices, as the engine gives them.

    Args:
        choices: that each call of the engine gives: the request's ``n``.
        bound: records that the response may hold, all choices together.
    """

    def __init__(self, choices: int, bound: int) -> None:
        self._choices: dict[int, _Choice] = {}
        self._per_call = choices
        self._calls = 0
        self._left = bound

    def noting(self, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """The outputs of a call of the engine as they are, noted on their way; calls come in the order of the prompts."""
        first = self._calls * self._per_call
        self._calls += 1
        return self._noting(outputs, first)

    async def _noting(self, outputs: AsyncGenerator[Any, None], first: int) -> AsyncGenerator[Any, None]:
        async with aclosing(outputs):
            async for output in outputs:
                for completion in output.outputs:
                    self._add(first + completion.index, completion)
                yield output

    def _add(self, number: int, completion: Any) -> None:
        trace: TokenTrace | None = getattr(completion, "entropix_trace", None)
        if trace is None:
            return
        choice = self._choices.get(number)
        if choice is None:
            choice = self._choices[number] = _Choice(_none_of(trace))
        # The last tokens have no record where the server's cap is reached.
        choice.token_ids.extend(completion.token_ids[: len(trace)])
        choice.waiting.join(trace)

    def take(self, number: int) -> Part | None:
        """What hasn't been told of a choice, as far as the bound goes; None if nothing of it was traced."""
        choice = self._choices.get(number)
        if choice is None:
            return None
        waiting, token_ids = choice.waiting, choice.token_ids
        choice.waiting, choice.token_ids = _none_of(waiting), []
        told = min(len(waiting), self._left)
        self._left -= told
        left_out = len(waiting) - told
        choice.not_kept += waiting.not_kept + left_out
        if left_out:
            choice.bound = "trace.response_tokens"
        elif waiting.not_kept and choice.bound is None:
            choice.bound = "trace.max_tokens"
        trace = waiting[:told]
        trace.not_kept = choice.not_kept
        return Part(token_ids[:told], trace, choice.bound)

    def take_all(self) -> Part | None:
        """The same of all choices, one after the other, for a response that has none: each is a turn of a conversation."""
        parts = [part for number in sorted(self._choices) if (part := self.take(number)) is not None]
        if not parts:
            return None
        trace = _none_of(parts[0].trace)
        for part in parts:
            trace.join(part.trace)
        bounds = [part.bound for part in parts if part.bound is not None]
        return Part([token for part in parts for token in part.token_ids], trace, bounds[-1] if bounds else None)


def _none_of(trace: TokenTrace) -> TokenTrace:
    """A trace of records as wide as these, of no token."""
    empty = trace[:0]
    empty.not_kept = 0
    return empty
