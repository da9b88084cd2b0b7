"""``vllm-entropix whatif``: the regimes of traced tokens under other thresholds."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.observability.whatif import Transitions, transitions
from vllm_entropix.records.regimes import Regime
from vllm_entropix.samplers import registry


def whatif(
    traces: Annotated[list[Path], typer.Argument(help="Files of traces.", show_default=False)],
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            "--sampler-config",
            help="What to try: a preset, JSON, or a .json, .toml or .yaml file.",
            show_default=False,
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count which regimes traced tokens would be in under other thresholds, without running the model."""
    config = registry.load_server(preset)
    found = transitions(chain.from_iterable(map(read_traces, traces)), config)
    if as_json:
        typer.echo(json.dumps({"preset": preset, **found.to_dict()}, indent=2))
        return
    console = Console()
    console.print(shares_table(found))
    console.print()
    console.print(transitions_table(found))
    console.print(
        f"[dim]{found.changed:,} of {found.tokens:,} tokens change their regime. The tokens stay as they were drawn: "
        "what would be generated instead, only a run can tell.[/dim]"
    )
    if found.without_regime:
        console.print(f"[dim]{found.without_regime:,} tokens of samplers without regimes are left out.[/dim]")


def shares_table(found: Transitions) -> Table:
    """Share of each regime before and after."""
    table = Table(title="Shares of the regimes", title_justify="left", title_style="bold")
    table.add_column("regime")
    for header in ("tokens as recorded", "share", "tokens then", "share", "change"):
        table.add_column(header, justify="right")
    for regime in Regime:
        before, after = found.before[regime.name], found.after[regime.name]
        change = (after - before) / found.tokens
        table.add_row(
            f"[{regime.style}]{regime.name}[/]",
            f"{before:,}",
            f"{before / found.tokens:.1%}",
            f"{after:,}",
            f"{after / found.tokens:.1%}",
            f"{change:+.1%}" if after != before else "·",
        )
    return table


def transitions_table(found: Transitions) -> Table:
    """Tokens by regime before (rows) and after (columns)."""
    table = Table(title="From (rows) to (columns)", title_justify="left", title_style="bold")
    table.add_column("from")
    for regime in Regime:
        table.add_column(regime.name, justify="right", header_style=regime.style)
    for before, (regime, row) in enumerate(zip(Regime, found.counts, strict=True)):
        cells = [f"[dim]{count:,}[/]" if after == before else f"[bold]{count:,}[/]" for after, count in enumerate(row)]
        table.add_row(
            f"[{regime.style}]{regime.name}[/]", *(cell if count else "·" for cell, count in zip(cells, row, strict=True))
        )
    return table
