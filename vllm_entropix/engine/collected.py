"""What the engine traced for one HTTP request, by choice, until it is told."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from vllm_entropix.engine.usage import Beside
from vllm_entropix.records.branches import ForkTree
from vllm_entropix.records.choice import choice_json, choice_values
from vllm_entropix.records.schema import Bound
from vllm_entropix.records.scores import AnswerScores
from vllm_entropix.records.trace import TokenTrace


@dataclass(frozen=True)
class Part:
    """What a response, or a chunk of a stream, tells of one choice.

    Attributes:
        token_ids: that have a record.
        trace: their records; its ``not_kept`` counts tokens so far that have none.
        bound: the setting that left those out.
        scores: of the whole answer, as JSON values; None: they are told elsewhere, or weren't asked for.
        sampler: that drew the tokens, as a request names it.
        forks: the whole answer's branches, as JSON values; None: they are told elsewhere, or it couldn't fork.
    """

    token_ids: list[int]
    trace: TokenTrace
    bound: Bound | None
    scores: dict[str, Any] | None = None
    sampler: str | None = None
    forks: list[dict[str, Any]] | None = None

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        return choice_values(self.token_ids, self.trace, self.bound, self.scores, self.sampler, self.forks)

    def json(self) -> Iterator[bytes]:
        """As JSON, some at a time; other threads run in between."""
        return choice_json(self.token_ids, self.trace, self.bound, self.scores, self.sampler, self.forks)


@dataclass
class _Choice:
    """What hasn't been told of a choice, and how many tokens so far have no record."""

    waiting: TokenTrace
    token_ids: list[int] = field(default_factory=list)
    not_kept: int = 0
    bound: Bound | None = None
    scores: dict[str, Any] | None = None
    tree: ForkTree | None = None

    @property
    def forks(self) -> list[dict[str, Any]] | None:
        """Its branches as JSON values."""
        return None if self.tree is None else [branch.model_dump(mode="json") for branch in self.tree.branches]


class Collected:
    """Records of a request's choices, as the engine gives them.

    Args:
        choices: that each call of the engine gives: the request's ``n``.
        bound: records that the response may hold, all choices together.
        sampler: that draws the request's tokens, as a request names it.
        traces: are records told? Those that the server traces by itself aren't, unless the request asks for them.
    """

    def __init__(self, choices: int, bound: int, sampler: str | None = None, traces: bool = True) -> None:
        # By call and number in it; a call gives more choices where all branches of an answer that forked are wanted.
        self._choices: dict[tuple[int, int], _Choice] = {}
        self._expected = choices
        self._given: list[int] = []  # choices of each call
        self._left = bound
        self._sampler = sampler
        self._traces = traces

    def noting(self, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """The outputs of a call of the engine as they are, noted on their way; calls come in the order of the prompts."""
        self._given.append(self._expected)
        return self._noting(outputs, len(self._given) - 1)

    async def _noting(self, outputs: AsyncGenerator[Any, None], call: int) -> AsyncGenerator[Any, None]:
        async with aclosing(outputs):
            async for output in outputs:
                for completion in output.outputs:
                    self._given[call] = max(self._given[call], completion.index + 1)
                    self._add((call, completion.index), completion)
                yield output

    def _add(self, number: tuple[int, int], completion: Any) -> None:
        trace: TokenTrace | None = getattr(completion, "entropix_trace", None) if self._traces else None
        scores: AnswerScores | None = getattr(completion, "entropix_scores", None)
        tree: ForkTree | None = getattr(completion, "entropix_forks", None)
        if trace is None and scores is None and tree is None:
            return
        choice = self._choices.get(number)
        if choice is None:
            choice = self._choices[number] = _Choice(TokenTrace() if trace is None else _none_of(trace))
        if scores is not None:
            choice.scores = scores.model_dump(mode="json")
        if tree is not None:
            choice.tree = tree
        if trace is None:
            return
        # The last tokens have no record where the server's cap is reached.
        choice.token_ids.extend(completion.token_ids[: len(trace)])
        choice.waiting.join(trace)

    @property
    def abstains(self) -> bool | None:
        """Does any choice abstain? None: the request doesn't say when."""
        asked = [choice.scores["abstained"] for choice in self._choices.values() if choice.scores is not None]
        return None if None in asked or not asked else any(asked)

    @property
    def beside(self) -> Beside | None:
        """Tokens that were generated beside the answers; None: no answer has told its branches."""
        calls: dict[int, list[ForkTree]] = {}
        for (call, _), choice in self._choices.items():
            if choice.tree is not None:
                calls.setdefault(call, []).append(choice.tree)
        if not calls:
            return None
        pruned = uncounted = 0
        for trees in calls.values():  # the same but for the branch that is the choice
            pruned += trees[0].beside([tree.chosen.id for tree in trees if tree.chosen is not None])
            uncounted += trees[0].generated - sum(tree.answered for tree in trees)
        return Beside(pruned, uncounted)

    def _numbered(self, number: int) -> _Choice | None:
        """A choice by its number in the response."""
        for call, given in enumerate(self._given):
            if number < given:
                return self._choices.get((call, number))
            number -= given
        return None

    def take(self, number: int, ended: bool = True) -> Part | None:
        """What hasn't been told of a choice, as far as the bound goes; None if nothing of it is told.

        Args:
            number: of the choice.
            ended: may its scores and its branches be told? In a stream they come with the answer's end.
        """
        choice = self._numbered(number)
        return None if choice is None else self._take(choice, ended)

    def _take(self, choice: _Choice, ended: bool) -> Part:
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
        scores, forks = (choice.scores, choice.forks) if ended else (None, None)
        return Part(token_ids[:told], trace, choice.bound, scores, self._sampler, forks)

    def take_all(self, ended: bool = True) -> Part | None:
        """The same of all choices, one after the other, for a response that has none: each is a turn of a conversation.

        The scores and the branches are the last turn's, which is the answer.
        """
        parts = [self._take(choice, ended) for _, choice in sorted(self._choices.items(), key=lambda item: item[0])]
        if not parts:
            return None
        trace = _none_of(parts[0].trace)
        for part in parts:
            trace.join(part.trace)
        bounds = [part.bound for part in parts if part.bound is not None]
        token_ids = [token for part in parts for token in part.token_ids]
        return Part(token_ids, trace, bounds[-1] if bounds else None, parts[-1].scores, self._sampler, parts[-1].forks)


def _none_of(trace: TokenTrace) -> TokenTrace:
    """A trace of records as wide as these, of no token."""
    empty = trace[:0]
    empty.not_kept = 0
    return empty
