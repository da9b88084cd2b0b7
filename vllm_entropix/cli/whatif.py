"""``vllm-entropix whatif``: the regimes of traced tokens under other thresholds."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vllm_entropix.config import EntropixConfig
from vllm_entropix.observability.terminal import STYLES
from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.observability.whatif import Transitions, transitions
from vllm_entropix.records.trace import REGIMES


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
    config = EntropixConfig.load(preset)
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


def shares_table(found: Transitions) -> Table:
    """Share of each regime before and after."""
    table = Table(title="Shares of the regimes", title_justify="left", title_style="bold")
    table.add_column("regime")
    for header in ("tokens as recorded", "share", "tokens then", "share", "change"):
        table.add_column(header, justify="right")
    for regime in REGIMES:
        before, after = found.before[regime], found.after[regime]
        change = (after - before) / found.tokens
        table.add_row(
            f"[{STYLES[regime]}]{regime}[/]",
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
    for regime in REGIMES:
        table.add_column(regime, justify="right", header_style=STYLES[regime])
    for before, (regime, row) in enumerate(zip(REGIMES, found.counts, strict=True)):
        cells = [f"[dim]{count:,}[/]" if after == before else f"[bold]{count:,}[/]" for after, count in enumerate(row)]
        table.add_row(
            f"[{STYLES[regime]}]{regime}[/]", *(cell if count else "·" for cell, count in zip(cells, row, strict=True))
        )
    return table
