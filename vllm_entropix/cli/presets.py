"""``vllm-entropix presets``: which presets there are, and what every setting is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any

import tomli_w
import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from vllm_entropix.samplers.entropix.presets import preset_text
from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET, EntropixConfig


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


def markdown_table() -> str:
    """All settings as a Markdown table (the README's), one column per preset."""
    names = EntropixConfig.preset_names()
    configs = [{name: value for name, value, _ in settings(EntropixConfig.preset(preset))} for preset in names]
    lines = [f"| setting | {' | '.join(names)} | unit | range | what it is |", f"|---|{'---|' * len(names)}---|---|---|"]
    for name, _, field in settings(EntropixConfig.preset(names[0])):
        values = [shown(config[name]) for config in configs]
        lines.append(f"| `{name}` | {' | '.join(values)} | {unit(field)} | {allowed(field)} | {field.description} |")
    return "\n".join(lines)


def description(preset: str) -> str:
    """What a shipped preset is: the comment that its file begins with."""
    comment = takewhile(lambda line: line.startswith("#"), preset_text(preset).splitlines())
    return " ".join(line.lstrip("# ") for line in comment).replace("`", "")


def toml(config: EntropixConfig) -> str:
    """A whole configuration as a file that ``--sampler-config`` takes."""
    return tomli_w.dumps(config.model_dump(by_alias=True, exclude_none=True))


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset alone, or a .json, .toml or .yaml file in full.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of all settings as Markdown.")] = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the preset or file in full, as TOML to start from.")] = False,
) -> None:
    """List presets and explain every setting: value, unit, range and meaning."""
    if markdown:
        typer.echo(markdown_table())
    elif as_toml:
        # TOML is UTF-8, whatever the terminal's encoding.
        typer.echo(toml(EntropixConfig.load(name)).encode(), nl=False)
    elif name is None:
        _print(*_compared())
    else:
        _print(*_in_full(name))


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


Listing = tuple[list[str], Sequence[str], list[Row]]
"""Sentences about the presets, headings of the values, settings."""


def _compared() -> Listing:
    """All presets, side by side."""
    names = EntropixConfig.preset_names()
    about = [f"{name}{' (default)' if name == DEFAULT_PRESET else ''}: {description(name)}" for name in names]
    rows = []
    for cells in zip(*(settings(EntropixConfig.preset(name)) for name in names), strict=True):
        values = tuple(shown(value) for _, value, _ in cells)
        rows.append(Row(cells[0][0], values, cells[0][2], stands_out=len(set(values)) > 1))
    return about, names, rows


def _in_full(source: str) -> Listing:
    """One preset or file; what differs from the preset that it starts from stands out."""
    config = EntropixConfig.load(source)
    preset = config.preset_name
    about = [f"{preset}: {description(preset)}"]
    if source != preset:
        about.insert(0, f"{source}: {preset} with what is marked *")
    pairs = zip(settings(config), settings(EntropixConfig.preset(preset)), strict=True)
    rows = [Row(name, (shown(value),), field, value != before) for (name, value, field), (_, before, _) in pairs]
    return about, ("value",), rows


def _print(about: list[str], headings: Sequence[str], rows: list[Row]) -> None:
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
    console.print(Text(f"  {line('setting', headings).rstrip()}", style="bold"))
    for row in rows:
        mark = "* " if row.stands_out else "  "
        console.print(Text(mark + line(row.name, row.values).rstrip(), style="bold" if row.stands_out else ""))
        console.print(Padding(Text(row.meaning, style="dim"), (0, 0, 0, 6)))
