"""Traces as JSON: what an OpenAI response carries in each choice's ``entropix``, as pydantic models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from vllm_entropix.records import fields
from vllm_entropix.records.branches import Branch
from vllm_entropix.records.fields import ALTERNATIVES, MAX_FLOAT32, VERSION
from vllm_entropix.records.scores import AnswerScores
from vllm_entropix.records.trace import TokenRecord, TokenTrace

# What every reader of JSON takes as a whole number, and what a float32 holds.
TokenId = Annotated[int, Field(ge=0, le=2**53 - 1)]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Number = Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
# Bounds of records per sequence, and of records per response.
Bound = Literal["trace.max_tokens", "trace.response_tokens"]
# What isn't known is ignored, so that a reader understands earlier and later releases. The schema tells what is written: all.
_CONFIG = ConfigDict(extra="ignore", json_schema_serialization_defaults_required=True)


class TokenEntry(BaseModel):
    """One generated token and why it was drawn as it was. Numbers that weren't measured or aren't finite are null."""

    # Between these stand the fields of the table, put there by _follow_table. What an entry doesn't tell is null: it may be of
    # another release, or of a server without some sampler.

    model_config = _CONFIG

    token_id: TokenId = Field(description="The token.")
    alternatives: list[tuple[TokenId, Number | None]] = Field(default_factory=list, max_length=255, description=ALTERNATIVES)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A field of the table."""

    @classmethod
    def from_record(cls, token_id: int, record: TokenRecord) -> TokenEntry:
        """The entry of a token."""
        return cls.model_validate({"token_id": token_id, **record.to_dict()})


class ChoiceTrace(BaseModel):
    """The trace of one choice; in a stream, of the tokens since the last chunk."""

    model_config = _CONFIG

    version: Annotated[int, Field(description="Version of this format.")] = VERSION
    sampler: str | None = Field(
        None, description="The sampler that drew the tokens, as a request's samplers names it; null: not known."
    )
    tokens: list[TokenEntry] = Field(default_factory=list, description="One entry per token, in order.")
    not_kept: Count = Field(0, description="Tokens so far that a bound of the server left without an entry.")
    bound: Bound | None = Field(None, description="Setting of the server that left tokens without an entry.")
    scores: AnswerScores | None = Field(
        None, description="Scores of the whole answer, in a stream with its end; null: they weren't asked for."
    )
    forks: list[Branch] | None = Field(
        None, description="The answer's branches, in a stream with its end, the first one first; null: it couldn't fork."
    )

    @classmethod
    def from_trace(cls, token_ids: Sequence[int], trace: TokenTrace, start: int = 0) -> ChoiceTrace:
        """Entries from token ``start`` on."""
        stop = min(len(trace), len(token_ids))
        records = trace[start:stop] if start < stop else ()
        return cls(tokens=list(map(TokenEntry.from_record, token_ids[start:stop], records)), not_kept=trace.not_kept)


_TYPES: dict[str, Any] = {"float": Number, "int": Annotated[int, Field(ge=0, le=2**31 - 1)], "bool": bool}


def _of_table(field: fields.Field) -> FieldInfo:
    """What pydantic is told of a field."""
    kind = Literal[field.categories] if field.categories else _TYPES[field.dtype]
    annotation: Any = kind | None if field.nullable else kind
    default: Any = ... if field.required else None if field.nullable else False
    return FieldInfo.from_annotated_attribute(annotation, Field(default, description=field.described))


def _follow_table() -> None:
    """Give entries the table's fields, and build anew what holds entries."""
    known = TokenEntry.__pydantic_fields__
    own = {name: known[name] for name in ("token_id", "alternatives")}
    known.clear()
    known["token_id"] = own["token_id"]
    known.update({field.name: _of_table(field) for field in fields.all_fields()})
    known["alternatives"] = own["alternatives"]
    for model in (TokenEntry, ChoiceTrace):
        model.model_rebuild(force=True)


fields.follow(_follow_table)
