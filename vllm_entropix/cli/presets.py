"""``vllm-entropix presets``: which presets there are, and what every setting is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated

import tomli_w
import typer

from vllm_entropix.cli.listing import Row, allowed, print_listing, settings, shown, unit
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix import calibrations
from vllm_entropix.samplers.entropix.presets import PUBLISHED, preset_text
from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET, EntropixConfig


def _preset(name: str) -> EntropixConfig:
    """A preset with every sampler's section."""
    return registry.server_settings().preset(name)


def markdown_table() -> str:
    """All settings as a Markdown table (the README's), with a column for each published preset."""
    names = PUBLISHED
    configs = [{name: value for name, value, _ in settings(_preset(preset))} for preset in names]
    lines = [f"| setting | {' | '.join(names)} | unit | range | what it is |", f"|---|{'---|' * len(names)}---|---|---|"]
    for name, _, field in settings(_preset(names[0])):
        values = [shown(config[name]) for config in configs]
        lines.append(f"| `{name}` | {' | '.join(values)} | {unit(field)} | {allowed(field)} | {field.description} |")
    return "\n".join(lines)


def description(preset: str) -> str:
    """What a shipped preset is: the comment that its file begins with, of a model's calibration up to the fingerprint."""
    ends = f"# {calibrations.line('')}"
    comment = takewhile(lambda line: line.startswith("#") and not line.startswith(ends), preset_text(preset).splitlines())
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
        typer.echo(toml(registry.load_server(name)).encode(), nl=False)
    elif name is None:
        print_listing(*_compared())
    else:
        print_listing(*_in_full(name))


Listing = tuple[list[str], Sequence[str], list[Row]]
"""Sentences about the presets, headings of the values, settings."""


def _compared() -> Listing:
    """All presets, and the published ones side by side."""
    names = PUBLISHED
    about = [
        f"{name}{' (default)' if name == DEFAULT_PRESET else ''}: {description(name)}" for name in EntropixConfig.preset_names()
    ]
    rows = []
    for cells in zip(*(settings(_preset(name)) for name in names), strict=True):
        values = tuple(shown(value) for _, value, _ in cells)
        rows.append(Row(cells[0][0], values, cells[0][2], stands_out=len(set(values)) > 1))
    return about, names, rows


def _in_full(source: str) -> Listing:
    """One preset or file; what differs from the preset that it starts from stands out."""
    config = registry.load_server(source)
    preset = config.preset_name
    about = [f"{preset}: {description(preset)}"]
    if source != preset:
        about.insert(0, f"{source}: {preset} with what is marked *")
    pairs = zip(settings(config), settings(_preset(preset)), strict=True)
    rows = [Row(name, (shown(value),), field, value != before) for (name, value, field), (_, before, _) in pairs]
    return about, ("value",), rows
