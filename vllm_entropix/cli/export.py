"""``vllm-entropix export``: traces as a table for other programs."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from vllm_entropix.observability.export import to_csv, to_parquet
from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.settings.errors import ConfigError

WRITERS = {".parquet": to_parquet, ".csv": to_csv}


def export(
    traces: Annotated[list[Path], typer.Argument(help="Files of traces.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write: .parquet or .csv.", show_default=False)],
    answers: Annotated[bool, typer.Option("--answers", help="A row per answer, with its scores and its text.")] = False,
) -> None:
    """Write traces as a table with a row per token, or one per answer."""
    write = WRITERS.get(output.suffix.lower())
    if write is None:
        raise ConfigError(f"can't export to {output.name!r}: its name should end in {' or '.join(WRITERS)}")
    rows = write(chain.from_iterable(map(read_traces, traces)), output, answers)
    typer.echo(f"wrote {output}: {rows:,} {'answers' if answers else 'tokens'}")
