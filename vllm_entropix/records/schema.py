"""Traces as JSON: what an OpenAI response carries in each choice's ``entropix``, as pydantic models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_entropix.records.fields import ALTERNATIVES, DESCRIPTIONS, MAX_FLOAT32, VERSION
from vllm_entropix.records.trace import TokenRecord, TokenTrace

# What every reader of JSON takes as a whole number, and what a float32 holds.
TokenId = Annotated[int, Field(ge=0, le=2**53 - 1)]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Number = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
# Of records per sequence, and of records per response.
Bound = Literal["trace.max_tokens", "trace.response_tokens"]
RegimeName = Literal["LELV", "HELV", "LEHV", "HEHV", "ADAPTIVE"]


class TokenEntry(BaseModel):
    """One generated token and why it was drawn as it was. Numbers that weren't measured or aren't finite are null."""

    model_config = ConfigDict(extra="ignore")

    token_id: TokenId = Field(description="The token.")
    regime: RegimeName = Field(description=DESCRIPTIONS["regime"])
    entropy: Number | None = Field(description=DESCRIPTIONS["entropy"])
    varentropy: Number | None = Field(description=DESCRIPTIONS["varentropy"])
    attention_entropy: Number | None = Field(description=DESCRIPTIONS["attention_entropy"])
    attention_varentropy: Number | None = Field(description=DESCRIPTIONS["attention_varentropy"])
    agreement: Number | None = Field(description=DESCRIPTIONS["agreement"])
    interaction_strength: Number | None = Field(description=DESCRIPTIONS["interaction_strength"])
    temperature: Number | None = Field(description=DESCRIPTIONS["temperature"])
    top_p: Number | None = Field(description=DESCRIPTIONS["top_p"])
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(description=DESCRIPTIONS["top_k"])
    min_p: Number | None = Field(description=DESCRIPTIONS["min_p"])
    confidence: Number | None = Field(description=DESCRIPTIONS["confidence"])
    forced: bool = Field(description=DESCRIPTIONS["forced"])
    alternatives: list[tuple[TokenId, Number | None]] = Field(default_factory=list, max_length=255, description=ALTERNATIVES)

    @classmethod
    def of(cls, token_id: int, record: TokenRecord) -> TokenEntry:
        """The entry of a token."""
        return cls(token_id=token_id, **record.to_dict())


class ChoiceTrace(BaseModel):
    """The trace of one choice; in a stream, of the tokens since the last chunk."""

    model_config = ConfigDict(extra="ignore")

    version: Annotated[int, Field(description="Version of this format.")] = VERSION
    tokens: list[TokenEntry] = Field(default_factory=list, description="One entry per token, in order.")
    not_kept: Count = Field(0, description="Tokens so far that a bound of the server left without an entry.")
    bound: Bound | None = Field(None, description="Setting of the server that left tokens without an entry.")

    @classmethod
    def of(cls, token_ids: Sequence[int], trace: TokenTrace, start: int = 0) -> ChoiceTrace:
        """Entries from token ``start`` on."""
        stop = min(len(trace), len(token_ids))
        records = trace[start:stop] if start < stop else ()
        return cls(tokens=list(map(TokenEntry.of, token_ids[start:stop], records)), not_kept=trace.not_kept)
