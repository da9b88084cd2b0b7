"""``vllm-entropix presets``: which presets there are, and what every setting is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import takewhile
from typing import Annotated, Any

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_entropix.config import DEFAULT_PRESET, EntropixConfig


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
    return str(value)


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
    text = (files("vllm_entropix") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in comment).replace("`", "")


def toml(config: EntropixConfig) -> str:
    """A whole configuration as a file that ``--sampler-config`` takes."""
    tables: dict[str, list[str]] = {}
    for dotted, value, _ in settings(config):
        table, _, name = dotted.rpartition(".")
        if value is not None:
            # JSON's numbers, strings, lists and truth values are TOML's, too.
            tables.setdefault(table, []).append(f"{name} = {json.dumps(value)}")
    parts = ["\n".join([f"[{table}]", *lines] if table else lines) for table, lines in tables.items()]
    return "\n\n".join(parts)


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset alone, or a .json or .toml file in full.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of all settings as Markdown.")] = False,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print the preset or file in full, as TOML to start from.")] = False,
) -> None:
    """List presets and explain every setting: value, unit, range and meaning."""
    if markdown:
        typer.echo(markdown_table())
    elif as_toml:
        typer.echo(toml(EntropixConfig.load(name)))
    elif name is None:
        _compare(Console())
    else:
        _show(Console(), name)


def _table(*columns: str) -> Table:
    table = Table()
    table.add_column("setting", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("unit")
    table.add_column("range", no_wrap=True)
    table.add_column("what it is", style="dim")
    return table


def _add_row(table: Table, dotted: str, values: list[str], field: FieldInfo, stands_out: bool) -> None:
    cells = [Text(value, style="bold" if stands_out else "") for value in values]
    table.add_row(dotted, *cells, unit(field), Text(allowed(field)), Text(field.description or ""))


def _compare(console: Console) -> None:
    """All presets, side by side."""
    names = EntropixConfig.preset_names()
    for preset in names:
        console.print(
            Text.assemble((preset, "bold"), " (default)" if preset == DEFAULT_PRESET else "", f": {description(preset)}")
        )
    table = _table(*names)
    for rows in zip(*(settings(EntropixConfig.preset(preset)) for preset in names), strict=True):
        dotted, _, field = rows[0]
        values = [shown(value) for _, value, _ in rows]
        _add_row(table, dotted, values, field, len(set(values)) > 1)
    console.print(table)


def _show(console: Console, name: str) -> None:
    """One preset or file; what differs from the preset that it starts from stands out."""
    config = EntropixConfig.load(name)
    preset = config.preset_name
    if name == preset:
        console.print(Text.assemble((name, "bold"), f": {description(name)}"))
    else:
        console.print(Text.assemble((name, "bold"), f": {preset} with what is bold. {preset}: {description(preset)}"))
    table = _table("value")
    for (dotted, value, field), (_, before, _) in zip(settings(config), settings(EntropixConfig.preset(preset)), strict=True):
        _add_row(table, dotted, [shown(value)], field, value != before)
    console.print(table)
