"""``vllm-entropix samplers``: which samplers there are, their settings, and which were refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from vllm_entropix.cli.listing import Row, allowed, print_listing, settings, shown, unit
from vllm_entropix.kernels.chains import stages_of
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.base import Sampler
from vllm_entropix.samplers.chain import stages
from vllm_entropix.samplers.stage import Stage, StatefulStage
from vllm_entropix.settings.server import BaseParameters, ServerSettings


def samplers(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the samplers and their settings as Markdown.")] = False,
    chain: Annotated[bool, typer.Option("--chain", help="Print, as Markdown, what a Chain may have.")] = False,
) -> None:
    """List the samplers that --sampler takes, their settings, and what a request calls these."""
    if chain:
        typer.echo(chain_table())
        return
    found = registry.registry()
    rows = [row for name in registry.names() for row in _rows(found.classes[name])]
    if markdown:
        typer.echo(_markdown(found, rows))
        return
    default = ServerSettings.model_fields["sampler"].default
    about = [
        f"{name}{' (default)' if name == default else ''}: {_about(found.classes[name], 'vllm-entropix presets')}"
        for name in registry.names()
    ]
    about += [f"refused: {reason}" for reason in found.refused.values()]
    print_listing(about, ("default", "request"), rows)


def _about(sampler: type[Sampler], presets: str) -> str:
    """What a sampler does, in a line; ``presets`` lists the settings of one that has no section."""
    line = (inspect.getdoc(sampler) or "").partition("\n")[0]
    return line if registry.has_section(sampler) else f"{line} Its settings: {presets}."


def _rows(sampler: type[Sampler]) -> Iterator[Row]:
    """The settings of a sampler's section: default, and what a request calls each."""
    if not registry.has_section(sampler):
        return
    keys = {setting: key for key, setting in registry.request_keys(sampler)}
    for name, value, field in settings(sampler.Settings()):
        key = name if name in BaseParameters.model_fields else keys.get(name, "")
        yield Row(f"{sampler.name}.{name}", (shown(value), key), field, stands_out=False)


def _markdown(found: registry.Registry, rows: list[Row]) -> str:
    lines = ["| sampler | what it does |", "|---|---|"]
    lines += [f"| `{name}` | {_about(found.classes[name], '`vllm-entropix presets`')} |" for name in registry.names()]
    lines += [f"| `{name}` | refused: {reason} |" for name, reason in found.refused.items()]
    lines += ["", "| setting | default | unit | range | in a request | what it is |", "|---|---|---|---|---|---|"]
    for row in rows:
        default, key = row.values
        of_request = f"`{key}`" if key else ""
        lines.append(
            f"| `{row.name}` | {default} | {unit(row.field)} | {allowed(row.field)} | {of_request} | {row.field.description} |"
        )
    return "\n".join(lines)


def chain_table() -> str:
    """The samplers that may stand in a chain: what, from where, by which rule, with which settings."""
    lines = ["| sampler | what it does, and its source | rule | settings: default, range | also called | looks at | kernel |"]
    lines.append(f"|{'---|' * (lines[0].count('|') - 1)}")
    for name, stage in stages().items():
        about = (sys.modules[stage.__module__].__doc__ or "").partition("\n")[0].partition(": ")[2]
        # What plans by itself, too, says of a chain what its stage does.
        told = stage.apply if issubclass(stage, Sampler) else stage
        rule = (inspect.getdoc(told) or "").partition("\n")[0].removeprefix("As a stage of a chain: ")
        also = ", ".join(f"`{alias}`" for alias in stage.aliases)
        cells = (f"`{name}`", about, rule, "; ".join(_of_chain(stage)), also, _looks_at(stage), _kernels_of(name))
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines)


def _of_chain(stage: type[Stage]) -> Iterator[str]:
    """Each setting of a stage in a few words."""
    section = stage.Settings.model_validate(dict(stage.chain_defaults))
    for name, value, field in settings(section):
        yield " ".join(part for part in (f"`{name}`: {shown(value)}", allowed(field), unit(field)) if part)


def _kernels_of(stage: str) -> str:
    """Where a kernel knows the stage."""
    devices = {"numba": "CPU", "triton": "GPU"}
    return ", ".join(device for backend, device in devices.items() if stage in stages_of(backend))


def _looks_at(stage: type[Stage]) -> str:
    if issubclass(stage, StatefulStage):
        return "the tokens drawn, by a number that it keeps"
    return "the text so far" if stage.needs_tokens else "the logits"
