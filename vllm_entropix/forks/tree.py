"""The tree of an answer: it is told what was drawn on each branch, says where new ones begin, and which are given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from vllm_entropix.forks.answers import rule_of
from vllm_entropix.forks.choice import ALL, Chooser, Contender, scores_of
from vllm_entropix.forks.policy import ContinuesWord, alternatives
from vllm_entropix.records import branches as told
from vllm_entropix.records.trace import TokenRecord
from vllm_entropix.settings.server import Forks


@dataclass(eq=False)
class Branch:
    """One branch of an answer.

    Attributes:
        id: its number, in the order of their beginnings.
        parent: the branch that it parted from.
        position: tokens of the answer before it parted.
        token_ids: the whole answer so far.
        logprobs, entropies, margins: of each of its tokens, as far as known; see :class:`~.choice.Contender`. None of one
            that was given up.
        last_fork: position of the last token at which it forked or parted.
        finished: has it run to its end?
        pruned_at: tokens of the answer when it was given up.
        score: what it was last compared by.
    """

    id: int
    parent: Branch | None = None
    position: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    entropies: list[float | None] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    last_fork: int | None = None
    finished: bool = False
    pruned_at: int | None = None
    score: float | None = None

    @property
    def is_live(self) -> bool:
        """Is it still generated?"""
        return not self.finished and self.pruned_at is None

    def append(self, token: int, record: TokenRecord | None) -> None:
        """Take the next token down."""
        self.token_ids.append(token)
        self.logprobs.append(None if record is None else _logprob(token, record))
        self.entropies.append(None if record is None else record.entropy)
        probabilities = [] if record is None else [probability for _, probability in record.alternatives[:2]]
        first, second, *_ = [*probabilities, None, None]
        self.margins.append(None if first is None or second is None else first - second)


@dataclass(frozen=True)
class Birth:
    """A branch that is to begin.

    Attributes:
        branch: the new one.
        parent: number of the one that it parts from.
        position: tokens of the answer that they share.
        token: the one that it goes on with.
        probability: of this token, before temperature and filters.
        rank: its place among the branches that begin there, from 0.
    """

    branch: int
    parent: int
    position: int
    token: int
    probability: float
    rank: int = 0


@dataclass
class _Fork:
    """A fork whose branches are yet to be compared."""

    branch: Branch
    position: int
    children: list[Branch]

    def side_of(self, branch: Branch) -> Branch | None:
        """The child, or the branch that forked, that a branch descends from since then; None: from neither."""
        before: Branch | None = None
        at: Branch | None = branch
        while at is not None:
            if at in self.children:
                return at
            if at is self.branch:
                return at if before is None or before.position > self.position else None
            before, at = at, at.parent
        return None


class Tree:
    """The branches of an answer.

    Args:
        settings: how the request forks.
        chosen_by: compares branches.
        continues_word: tells where words go on; None: nobody knows.
        may_fork: asked before each fork, beside the settings.
        text_of: number of a branch → its text so far.
        pieces_of: tokens → the text of each.
        coin_of: number of a branch and a place in the answer → a number from 0 to 1, below which the share of forks is.
    """

    def __init__(
        self,
        settings: Forks,
        chosen_by: Chooser,
        continues_word: ContinuesWord | None = None,
        may_fork: Callable[[], bool] = lambda: True,
        text_of: Callable[[int], str] = lambda branch: "",
        pieces_of: Callable[[Sequence[int]], Sequence[str]] = lambda token_ids: (),
        coin_of: Callable[[int, int], float] = lambda branch, position: 0.0,
    ) -> None:
        self.settings = settings
        self._chosen_by = chosen_by
        self._continues_word = continues_word
        self._may_fork = may_fork
        self._text_of = text_of
        self._pieces_of = pieces_of
        self._coin_of = coin_of
        self._rule = None if settings.answer is None else rule_of(settings.answer)
        self.branches = [Branch(0)]
        self._unpruned = self.branches[:]
        self._generated = self._longest = 0  # tokens of all branches, what they share once, and of the longest one
        self._forks: list[_Fork] = []

    @property
    def live(self) -> list[Branch]:
        """Branches that are still generated."""
        return [branch for branch in self._unpruned if branch.is_live]

    @property
    def spent(self) -> int:
        """Tokens of all branches beyond the longest one's."""
        return self._generated - self._longest

    def feed(self, number: int, token_ids: Sequence[int], records: Sequence[TokenRecord | None], ended: bool) -> list[Birth]:
        """Tell what was drawn on a branch in a step.

        Args:
            number: of the branch.
            token_ids: the new tokens.
            records: theirs; None where a bound left a token without one.
            ended: did the branch run to its end with them?

        Returns:
            The branches that part from it at these tokens.
        """
        branch = self.branches[number]
        births = []
        for token, record in zip(token_ids, records, strict=True):
            births += self._fork(branch, token, record)
            self._append(branch, token, record)
        branch.finished = branch.finished or ended
        return births

    def end(self, number: int) -> None:
        """A branch has run to its end with the token that it parted with."""
        self.branches[number].finished = True

    def fail(self, number: int) -> None:
        """The engine gave a branch up: it competes no more, unless it is all that there is."""
        branch = self.branches[number]
        branch.finished = True
        if branch.pruned_at is None and len(self._kept()) > 1:
            self._prune([branch])

    def _fork(self, branch: Branch, token: int, record: TokenRecord | None) -> list[Birth]:
        """New branches beside the branch's next token."""
        settings, position = self.settings, len(branch.token_ids)
        if record is None or branch.pruned_at is not None:
            return []
        if branch.last_fork is not None and position - branch.last_fork < settings.distance:
            return []
        room = settings.branches - len(self.live)
        if room <= 0 or self.spent >= settings.budget:
            return []
        before = branch.token_ids[-1] if position else None
        others = alternatives(settings, record, token, before, self._continues_word)[:room]
        if not others or self._coin_of(branch.id, position) >= settings.share or not self._may_fork():
            return []
        branch.last_fork = position
        births, children = [], []
        for rank, (other, probability) in enumerate(others):
            child = Branch(
                *(len(self.branches), branch, position, branch.token_ids[:]),
                *(branch.logprobs[:], branch.entropies[:], branch.margins[:]),
                last_fork=position,
            )
            self._append(child, other, record)
            self.branches.append(child)
            self._unpruned.append(child)
            children.append(child)
            births.append(Birth(child.id, branch.id, position, other, probability, rank))
        if settings.horizon:
            self._forks.append(_Fork(branch, position, children))
        return births

    def _append(self, branch: Branch, token: int, record: TokenRecord | None) -> None:
        branch.append(token, record)
        self._generated += 1
        self._longest = max(self._longest, len(branch.token_ids))

    def settle(self) -> list[int]:
        """Compare branches whose horizon is reached, or all if the budget is; numbers of those that are given up."""
        pruned: list[int] = []
        # Later forks first: their best stands for its side of an earlier one.
        for fork in sorted(self._forks, key=lambda fork: fork.position, reverse=True):
            end = fork.position + self.settings.horizon
            sides = {branch: side for branch in self._kept() if (side := fork.side_of(branch)) is not None}
            if len(set(sides.values())) < 2:
                self._forks.remove(fork)
            elif all(branch.finished or len(branch.token_ids) > end for branch in sides):
                self._forks.remove(fork)
                best = self._best(list(sides), fork.position, end + 1)
                pruned += self._prune([branch for branch, side in sides.items() if side is not sides[best]])
        # Where all are wanted, those that have ended stay.
        rivals = self.live if self._all else self._kept()
        if self.live and len(rivals) > 1 and self.spent >= self.settings.budget:
            best = self._best(rivals, _shared(rivals), None)
            pruned += self._prune([branch for branch in rivals if branch is not best])
            self._forks.clear()
        return pruned

    @property
    def _all(self) -> bool:
        return self.settings.select == ALL

    def chosen(self, best: int) -> list[int]:
        """Numbers of the branches that are the answer, the best one first: it alone, unless all are wanted."""
        others = [branch.id for branch in self._kept() if branch.id != best] if self._all else []
        return [best, *others]

    def choose(self) -> int | None:
        """Number of the branch that is the answer, once no branch is live; None: some still are."""
        if self.live:
            return None
        kept = self._kept()
        return (kept[0] if len(kept) == 1 else self._best(kept, _shared(kept), None)).id

    def decided(self, since: int = 0) -> tuple[int, int]:
        """(number of a branch, how many of its first tokens are the answer's, however it goes on).

        Args:
            since: tokens that are known to be decided.
        """
        kept = self._kept()
        return kept[0].id, len(kept[0].token_ids) if len(kept) == 1 else _shared(kept, since)

    def _kept(self) -> list[Branch]:
        return self._unpruned[:]

    def _prune(self, losers: list[Branch]) -> list[int]:
        for branch in losers:
            branch.pruned_at = len(branch.token_ids)
            # It is compared no more, and a long answer may give up thousands.
            branch.logprobs, branch.entropies, branch.margins = [], [], []
        self._unpruned = [branch for branch in self._unpruned if branch.pruned_at is None]
        return [branch.id for branch in losers]

    def _best(self, branches: list[Branch], start: int, stop: int | None) -> Branch:
        """The best of some branches by their tokens from ``start`` to ``stop``, the earliest of equals."""
        contenders = []
        for branch in branches:
            end = len(branch.token_ids) if stop is None else min(stop, len(branch.token_ids))
            contenders.append(
                Contender(
                    branch=branch.id,
                    token_ids=branch.token_ids[:],
                    start=start,
                    stop=end,
                    logprobs=branch.logprobs[start:end],
                    entropies=branch.entropies[start:end],
                    margins=branch.margins[start:end],
                    finished=branch.finished,
                    text=partial(self._text_of, branch.id),
                    pieces=partial(self._pieces_of, branch.token_ids[:]),
                    rule=self._rule,
                )
            )
        scores = scores_of(self._chosen_by, contenders)
        for branch, score in zip(branches, scores, strict=True):
            branch.score = score if math.isfinite(score) else None
        return branches[max(range(len(branches)), key=lambda index: (scores[index], -index))]

    def described(self, chosen: int | None) -> told.ForkTree:
        """The tree as it is told."""
        return told.ForkTree(branches=list(self._described(chosen)))

    def _described(self, chosen: int | None) -> Iterator[told.Branch]:
        for branch in self.branches:
            yield told.Branch(
                id=branch.id,
                parent=None if branch.parent is None else branch.parent.id,
                position=branch.position,
                token=None if branch.parent is None else branch.token_ids[branch.position],
                tokens=len(branch.token_ids) - branch.position,
                score=branch.score,
                pruned_at=branch.pruned_at,
                chosen=branch.id == chosen,
            )


def _shared(branches: Sequence[Branch], known: int = 0) -> int:
    """Number of tokens that all of them begin with; of the first ``known`` it is known."""
    count = known
    for tokens in zip(*(branch.token_ids[known:] for branch in branches), strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def _logprob(token: int, record: TokenRecord) -> float | None:
    """Log-probability of a token by its record, or by that of the token drawn in its place; None: not known."""
    probability = next((probability for other, probability in record.alternatives if other == token), None)
    if probability is not None:
        return math.log(probability) if probability > 0 else -math.inf
    value: float | None = record.logprob
    return value
