"""The tree of an answer that forked, as it is told: which branches there were, and which became the answer."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import BaseModel, ConfigDict, Field


class Branch(BaseModel):
    """One branch of an answer.

    Its tokens are its parent's up to ``position``, then ``token`` and what was drawn after it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", json_schema_serialization_defaults_required=True)

    id: int = Field(ge=0, description="Number of the branch; 0 is the one that the request began.")
    parent: int | None = Field(None, description="Branch that it parted from; null: none.")
    position: int = Field(0, ge=0, description="Tokens of the answer before it parted.")
    token: int | None = Field(None, description="Token that it parted with; null: it began with the request.")
    tokens: int = Field(ge=0, description="Tokens of its own, the one that it parted with among them.")
    score: float | None = Field(None, description="What it was last compared by; null: never compared, or nothing is known.")
    pruned_at: int | None = Field(None, description="Tokens of the answer when it was given up; null: it ran to its end.")
    chosen: bool = Field(False, description="Is it the answer?")


class ForkTree(BaseModel):
    """All branches of an answer, in the order in which they began."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    branches: list[Branch] = Field(description="One entry per branch.")

    @property
    def generated(self) -> int:
        """Tokens of all branches together."""
        return sum(branch.tokens for branch in self.branches)

    @property
    def answered(self) -> int:
        """Tokens of the answer; 0 if no branch is."""
        return 0 if self.chosen is None else self.chosen.position + self.chosen.tokens

    @property
    def pruned(self) -> int:
        """Tokens that were generated beside the answer."""
        return self.beside([] if self.chosen is None else [self.chosen.id])

    def beside(self, answers: Collection[int]) -> int:
        """Tokens that are part of none of some branches; ``answers``: their numbers."""
        kept: dict[int, int] = {}  # by branch: its own tokens up to the last that is part of one
        for branch in reversed(self.branches):  # children come after their parents
            if branch.id in answers:
                kept[branch.id] = branch.tokens
            if branch.parent is not None and branch.id in kept:
                shared = branch.position - self.branches[branch.parent].position
                kept[branch.parent] = max(kept.get(branch.parent, 0), shared)
        return self.generated - sum(kept.values())

    @property
    def chosen(self) -> Branch | None:
        """The branch that is the answer; None if none ran to its end."""
        return next((branch for branch in self.branches if branch.chosen), None)
