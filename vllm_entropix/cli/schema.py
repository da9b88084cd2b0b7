"""``vllm-entropix schema``: the formats of traces, as JSON schemas, and the table of what a record holds."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer
from pydantic import BaseModel

from vllm_entropix.records.fields import markdown_table
from vllm_entropix.records.line import TraceLine
from vllm_entropix.records.schema import ChoiceTrace

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Format(StrEnum):
    """Where a trace is found; or the table of a record's fields."""

    HTTP = "http"
    FILE = "file"
    FIELDS = "fields"


_MODELS: dict[Format, type[BaseModel]] = {Format.HTTP: ChoiceTrace, Format.FILE: TraceLine}


def schema_text(kind: Format) -> str:
    """The schema of a format, as it lies in ``docs/``; of the fields, their table in Markdown."""
    if kind is Format.FIELDS:
        return markdown_table()
    return json.dumps(
        {"$schema": _DIALECT, **_MODELS[kind].model_json_schema(mode="serialization")}, indent=2, ensure_ascii=False
    )


def schema(
    kind: Annotated[
        Format,
        typer.Argument(
            help="http: `entropix` in a choice of a response or chunk; file: a line of a trace file; "
            "fields: what a record holds, as a Markdown table."
        ),
    ] = Format.HTTP,
) -> None:
    """Print the JSON schema of a trace, or what a record holds."""
    typer.echo(schema_text(kind))
