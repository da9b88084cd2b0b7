"""A line of a trace file: the trace of one finished sequence, to be read without the model and without its tokenizer.

A line holds what was generated and why. Of the prompt it holds a hash and a length, and its text only where asked.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Self, TextIO, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from vllm_entropix.records import fields
from vllm_entropix.records.branches import Branch
from vllm_entropix.records.schema import Count, TokenEntry, TokenId
from vllm_entropix.records.scores import AnswerScores, scores_of_entries
from vllm_entropix.records.tokens import token_texts
from vllm_entropix.records.trace import TokenTrace

# Version of the format. Version 1 had the preset, fidelity and thresholds of entropix beside everything else.
VERSION = 2
_SAMPLER = "The sampler that drew the tokens, and what it tells of its settings; null: not known."
_T = TypeVar("_T")
_parts: dict[str, type[SamplerPart]] = {}


class SamplerPart(BaseModel):
    """What a line tells of the sampler that drew its tokens: its name, and what that sampler adds."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="Name of the sampler.")

    @model_validator(mode="after")
    def _is_told_by_its_sampler(self) -> Self:
        if type(self) is SamplerPart and self.name in _parts:
            raise ValueError(f"not what the sampler {self.name} tells")
        return self


class TraceLine(BaseModel):
    """The trace of one finished sequence. A request with n > 1 gives n lines, and an answer that forked one per branch."""

    model_config = ConfigDict(extra="ignore")

    version: int = Field(VERSION, description="Version of this format.")
    request_id: str = Field(description="The request's id in the engine.")
    index: Count = Field(0, description="Number of the sequence among the request's n.")
    model: str | None = Field(None, description="Name of the model.")
    created: str = Field(description="When the sequence was finished, ISO 8601, UTC.")
    # A registered sampler's own part, if it is one's: see register_part.
    sampler: SamplerPart | None = Field(None, description=_SAMPLER)
    prompt_hash: str | None = Field(
        None, description="SHA-256 of the prompt's token ids as little-endian int64, in hexadecimal; null: not known."
    )
    prompt: str | None = Field(None, description="Text of the prompt, where trace.prompts is on.")
    prompt_tokens: Count = Field(description="Tokens of the prompt.")
    token_ids: list[TokenId] = Field(description="The generated tokens.")
    texts: list[str] = Field(
        description="Text of each token; of a character that is split over tokens, all of it stands with the last."
    )
    finish_reason: str | None = Field(None, description="Why generation ended.")
    not_kept: Count = Field(0, description="Tokens after the server's cap, which have no record.")
    scores: AnswerScores | None = Field(
        None, description="Scores of the whole answer; null: an earlier release wrote the line, or some tokens have no record."
    )
    branch: Branch | None = Field(
        None,
        description="Which branch of an answer that forked the sequence is; each has a line. Null: the answer didn't fork.",
    )
    forks: list[Branch] | None = Field(
        None, description="All branches of the answer, in the line of the one that is the answer."
    )
    records: list[TokenEntry] = Field(description="One entry per token, in order; the last not_kept tokens have none.")
    alternative_texts: dict[TokenId, str] = Field(
        default_factory=dict, description="Text of each token among the alternatives."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_version_1(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("version") != 1:
            return data
        told = {name: data.get(name) for name in ("preset", "fidelity", "thresholds")}
        return {**data, "version": VERSION, "sampler": {"name": "entropix", **told} if any(told.values()) else None}

    @field_validator("version")
    @classmethod
    def _known(cls, version: int) -> int:
        if version != VERSION:
            raise ValueError(f"version {version} of the trace format; this release reads versions 1 to {VERSION}")
        return version

    @model_validator(mode="after")
    def _a_text_per_token(self) -> Self:
        if not len(self.records) <= len(self.token_ids) == len(self.texts):
            numbers = f"{len(self.token_ids)} token_ids, {len(self.texts)} texts, {len(self.records)} records"
            raise ValueError(f"{numbers}: each token has a text, and one record at most")
        return self

    @classmethod
    def from_completion(
        cls,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        completion: Any,
        trace: TokenTrace,
        sampler: SamplerPart | None,
        tokenizer: Any,
        model: str | None = None,
    ) -> Self:
        """The line of a finished sequence.

        Args:
            request_id: of the request.
            prompt_token_ids: of which the hash is kept.
            completion: vLLM's CompletionOutput with all of the sequence's tokens.
            trace: its records.
            sampler: what is told of the sampler and the settings that the sequence ran with.
            tokenizer: gives tokens their texts.
            model: name of the model.
        """
        token_ids = list(completion.token_ids)
        records = [TokenEntry.from_record(token, record) for token, record in zip(token_ids, trace, strict=False)]
        alternatives = {token for entry in records for token, _ in entry.alternatives}
        return cls(
            request_id=request_id,
            index=completion.index,
            model=model,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            sampler=sampler,
            prompt_hash=prompt_hash(prompt_token_ids),
            prompt_tokens=len(prompt_token_ids),
            token_ids=token_ids,
            texts=list(token_texts(tokenizer, token_ids)),
            finish_reason=completion.finish_reason,
            not_kept=len(token_ids) - len(records),
            forks=getattr(getattr(completion, "entropix_forks", None), "branches", None),
            scores=getattr(completion, "entropix_scores", None) or (scores_of_entries(records) if not trace.not_kept else None),
            records=records,
            alternative_texts={token: tokenizer.decode([token]) for token in sorted(alternatives)},
        )

    @property
    def is_answer(self) -> bool:
        """Is it an answer, and no branch that was given up for another?"""
        return self.branch is None or self.branch.chosen

    def answer_scores(self) -> AnswerScores:
        """The scores of the answer: those that the line tells, or else those of the tokens that have records."""
        return self.scores if self.scores is not None else scores_of_entries(self.records)

    @property
    def drawn_by(self) -> str | None:
        """The sampler as a request's ``samplers`` names it, a chain by those in it; None: not known."""
        chain = self.of_sampler("samplers", str)
        return self.of_sampler("name", str) if chain is None else chain

    def of_sampler(self, name: str, kind: type[_T]) -> _T | None:
        """Something that the line tells of the sampler; None if it doesn't, or if it isn't of this kind."""
        value = getattr(self.sampler, name, None)
        return value if isinstance(value, kind) else None


def register_part(name: str, part: type[SamplerPart]) -> None:
    """Let a sampler tell of itself in a line what ``part`` describes; lines of the sampler that hold anything else are none.

    Without a part of its own a sampler tells what it likes.

    Args:
        name: the sampler's.
        part: has ``name: Literal[name]``.
    """
    _parts[name] = part
    _rebuild()


def named(name: str, **told: Any) -> SamplerPart | None:
    """What a line tells of a sampler of which no more than this is known; None if the sampler tells more in any line."""
    try:
        return _parts.get(name, SamplerPart).model_validate({"name": name, **told})
    except ValidationError:
        return None


def _rebuild() -> None:
    """Make lines hold the table's fields, and what each sampler tells."""
    kinds: Any = Union[*_parts.values(), SamplerPart, None]
    described = FieldInfo.from_annotated_attribute(kinds, Field(None, description=_SAMPLER))
    TraceLine.__pydantic_fields__["sampler"] = described
    TraceLine.model_rebuild(force=True)


fields.follow(_rebuild)


def prompt_hash(token_ids: Sequence[int]) -> str:
    """What stands for a prompt in a trace: the same for the same tokens, and no way back to them but guessing."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}q", *token_ids)).hexdigest()


def write_traces(file: TextIO, lines: Iterable[TraceLine]) -> None:
    """Append lines to an open text file."""
    for line in lines:
        file.write(line.model_dump_json() + "\n")
