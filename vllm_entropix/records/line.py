"""A line of a trace file: the trace of one finished sequence, to be read without the model and without its tokenizer.

A line holds what was generated and why. Of the prompt it holds a hash and a length, and its text only where asked.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Self, TextIO

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_entropix.records import fields
from vllm_entropix.records.schema import Count, TokenEntry, TokenId
from vllm_entropix.records.tokens import token_texts
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.samplers.entropix.settings import EntropixConfig, Thresholds

VERSION = 1


class TraceLine(BaseModel):
    """The trace of one finished sequence. A request with n > 1 gives n lines."""

    model_config = ConfigDict(extra="ignore")

    version: int = Field(VERSION, description="Version of this format.")
    request_id: str = Field(description="The request's id in the engine.")
    index: Count = Field(0, description="Number of the sequence among the request's n.")
    model: str | None = Field(None, description="Name of the model.")
    created: str = Field(description="When the sequence was finished, ISO 8601, UTC.")
    preset: str | None = Field(None, description="Preset of the sequence's constants; null: not known.")
    fidelity: str | None = Field(None, description="corrected or original; null: not known.")
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
    thresholds: Thresholds | None = Field(None, description="Borders of the regimes that were used; null: not known.")
    records: list[TokenEntry] = Field(description="One entry per token, in order; the last not_kept tokens have none.")
    alternative_texts: dict[TokenId, str] = Field(
        default_factory=dict, description="Text of each token among the alternatives."
    )

    @field_validator("version")
    @classmethod
    def _known(cls, version: int) -> int:
        if version != VERSION:
            raise ValueError(f"version {version} of the trace format; this release reads version {VERSION}")
        return version

    @model_validator(mode="after")
    def _a_text_per_token(self) -> Self:
        if not len(self.records) <= len(self.token_ids) == len(self.texts):
            numbers = f"{len(self.token_ids)} token_ids, {len(self.texts)} texts, {len(self.records)} records"
            raise ValueError(f"{numbers}: each token has a text, and one record at most")
        return self

    @classmethod
    def of(
        cls,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        completion: Any,
        trace: TokenTrace,
        config: EntropixConfig,
        tokenizer: Any,
        model: str | None = None,
    ) -> Self:
        """The line of a finished sequence.

        Args:
            request_id: of the request.
            prompt_token_ids: of which the hash is kept.
            completion: vLLM's CompletionOutput with all of the sequence's tokens.
            trace: its records.
            config: the settings the sequence ran with, its own preset included.
            tokenizer: gives tokens their texts.
            model: name of the model.
        """
        token_ids = list(completion.token_ids)
        records = [TokenEntry.of(token, record) for token, record in zip(token_ids, trace, strict=False)]
        alternatives = {token for entry in records for token, _ in entry.alternatives}
        return cls(
            request_id=request_id,
            index=completion.index,
            model=model,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            preset=config.preset_name,
            fidelity=config.fidelity,
            prompt_hash=prompt_hash(prompt_token_ids),
            prompt_tokens=len(prompt_token_ids),
            token_ids=token_ids,
            texts=list(token_texts(tokenizer, token_ids)),
            finish_reason=completion.finish_reason,
            not_kept=len(token_ids) - len(records),
            thresholds=config.thresholds,
            records=records,
            alternative_texts={token: tokenizer.decode([token]) for token in sorted(alternatives)},
        )


def _follow_table() -> None:
    TraceLine.model_rebuild(force=True)


fields.follow(_follow_table)


def prompt_hash(token_ids: Sequence[int]) -> str:
    """What stands for a prompt in a trace: the same for the same tokens, and no way back to them but guessing."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}q", *token_ids)).hexdigest()


def write_traces(file: TextIO, lines: Iterable[TraceLine]) -> None:
    """Append lines to an open text file."""
    for line in lines:
        file.write(line.model_dump_json() + "\n")
