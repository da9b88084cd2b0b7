"""How settings are listed: name, values and meaning, for a terminal of any width and through a pipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.text import Text


def settings(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, FieldInfo]]:
    """Every setting of a configuration: dotted name as users write it, value, field."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        dotted = f"{prefix}{field.alias or name}"
        if isinstance(value, BaseModel):
            yield from settings(value, f"{dotted}.")
        else:
            yield dotted, value, field


def allowed(field: FieldInfo) -> str:
    """The range of a numeric setting, in interval notation; empty for others."""
    low, high = "", ""
    for bound in field.metadata:
        if isinstance(bound, Ge):
            low = f"[{bound.ge}"
        elif isinstance(bound, Gt):
            low = f"({bound.gt}"
        elif isinstance(bound, Le):
            high = f"{bound.le}]"
        elif isinstance(bound, Lt):
            high = f"{bound.lt})"
    return f"{low}, {high}" if low and high else ""


def unit(field: FieldInfo) -> str:
    """The unit of a setting."""
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def shown(value: Any) -> str:
    """A setting's value as it is written in TOML."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    # Quoted where it couldn't be read otherwise, or would move a terminal's cursor.
    plain = not isinstance(value, str) or (value.isprintable() and value == value.strip())
    return str(value) if plain else json.dumps(value)


@dataclass(frozen=True)
class Row:
    """A setting as it is listed.

    Attributes:
        name: dotted, as users write it.
        values: its values as TOML, one per preset that is shown.
        field: its unit, range and description.
        stands_out: differs between the presets, or from the preset that a file starts from.
    """

    name: str
    values: tuple[str, ...]
    field: FieldInfo
    stands_out: bool

    @property
    def meaning(self) -> str:
        """Description, range and unit."""
        bounds = " ".join(part for part in (allowed(self.field), unit(self.field)) if part)
        return f"{self.field.description or ''} {bounds}".strip()


def print_listing(about: Sequence[str], headings: Sequence[str], rows: Sequence[Row]) -> None:
    """For people: names and values with the meaning beneath. Through a pipe: plain text, each setting on a line."""
    # A long text runs over instead of moving all others.
    widths = [min(max(map(len, column)), 16) for column in zip(headings, *(row.values for row in rows), strict=True)]
    first = max(len(row.name) for row in rows)

    def line(name: str, cells: Sequence[str]) -> str:
        return "  ".join([name.ljust(first), *(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))])

    console = Console(highlight=False)
    if not console.is_terminal:
        for sentence in about:
            typer.echo(sentence)
        typer.echo(f"\n  {line('setting', headings)}  meaning")
        for row in rows:
            typer.echo(f"{'*' if row.stands_out else ' '} {line(row.name, row.values)}  {row.meaning}")
        return
    for sentence in about:
        console.print(Text(sentence))
    console.print()

    def show(mark: str, name: str, cells: Sequence[str], style: str) -> None:
        told = Text(f"{mark} {line(name, cells).rstrip()}", style=style)
        over = len(told) > console.width
        begun, *rest = told.wrap(console, console.width - (6 if over else 0))
        console.print(begun)
        for more in rest:
            console.print(Padding(more, (0, 0, 0, 6)))

    show(" ", "setting", headings, "bold")
    for row in rows:
        show("*" if row.stands_out else " ", row.name, row.values, "bold" if row.stands_out else "")
        console.print(Padding(Text(row.meaning, style="dim"), (0, 0, 0, 6)))
