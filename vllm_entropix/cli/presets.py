"""``vllm-entropix presets``: which presets there are, and what every setting is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

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


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset alone.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """List presets with every setting: value, unit, range and meaning."""
    if markdown:
        typer.echo(markdown_table())
        return
    names = EntropixConfig.preset_names() if name is None else (name,)
    configs = [EntropixConfig.preset(preset) for preset in names]
    table = Table(title=f"Presets of vllm-entropix (default: {DEFAULT_PRESET})", title_justify="left")
    table.add_column("setting", no_wrap=True)
    for preset in names:
        table.add_column(preset, justify="right")
    table.add_column("unit")
    table.add_column("range", no_wrap=True)
    table.add_column("what it is", style="dim")
    for rows in zip(*(settings(config) for config in configs), strict=True):
        dotted, _, field = rows[0]
        values = [shown(value) for _, value, _ in rows]
        if len(set(values)) > 1:
            values = [f"[bold]{value}[/bold]" for value in values]
        table.add_row(dotted, *values, unit(field), allowed(field).replace("[", r"\["), field.description)
    Console().print(table)
