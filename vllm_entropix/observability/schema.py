"""Traces as JSON: what an OpenAI response carries in each choice's ``entropix``, as pydantic models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_entropix.observability.trace import TokenRecord, TokenTrace

VERSION = 1
RegimeName = Literal["LELV", "HELV", "LEHV", "HEHV", "ADAPTIVE"]


class TokenEntry(BaseModel):
    """One generated token and why it was drawn as it was. Metrics that weren't measured are null."""

    model_config = ConfigDict(extra="ignore")

    token_id: int = Field(description="The token.")
    regime: RegimeName = Field(description="Kind of uncertainty that the model was in.")
    entropy: float | None = Field(description="Entropy of the next-token distribution, bits.")
    varentropy: float | None = Field(description="Varentropy of the next-token distribution, bits².")
    attention_entropy: float | None = Field(description="Attention entropy, mean over heads and observed layers, bits.")
    attention_varentropy: float | None = Field(description="Variance over heads of the attention entropy, bits².")
    agreement: float | None = Field(description="Mean deviation of the heads from their mean; grows as they disagree.")
    interaction_strength: float | None = Field(description="Mean absolute attention score.")
    temperature: float = Field(description="Temperature of the draw; 0 is argmax.")
    top_p: float = Field(description="Nucleus mass of the draw.")
    top_k: int = Field(description="Number of candidates of the draw.")
    min_p: float = Field(description="Smallest probability of the draw, relative to the largest.")
    confidence: float | None = Field(description="Confidence score C.")
    forced: bool = Field(description="Forced as part of a clarification.")
    alternatives: list[tuple[int, float]] = Field(
        default_factory=list, description="Most probable tokens as (id, probability), before temperature and filters."
    )

    @classmethod
    def of(cls, token_id: int, record: TokenRecord) -> TokenEntry:
        """The entry of a token."""
        return cls(token_id=token_id, **record.to_dict())


class ChoiceTrace(BaseModel):
    """The trace of one choice; in a stream, of the tokens since the last chunk."""

    model_config = ConfigDict(extra="ignore")

    version: Annotated[int, Field(description="Version of this format.")] = VERSION
    tokens: list[TokenEntry] = Field(default_factory=list, description="One entry per token, in order.")
    not_kept: int = Field(0, description="Tokens so far that came after the server's cap and have no entry.")

    @classmethod
    def of(cls, token_ids: Sequence[int], trace: TokenTrace, start: int = 0) -> ChoiceTrace:
        """Entries from token ``start`` on."""
        stop = min(len(trace), len(token_ids))
        return cls(
            tokens=[TokenEntry.of(token_ids[place], trace[place]) for place in range(start, stop)], not_kept=trace.not_kept
        )
