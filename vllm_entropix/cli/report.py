"""``vllm-entropix report``: traces as one HTML file, or in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vllm_entropix.observability.report import Source, write_report
from vllm_entropix.observability.terminal import TracedText, coloured, legend, printable, summary_table
from vllm_entropix.observability.tracefile import TraceLine, read_traces


def report(
    traces: Annotated[list[Path], typer.Argument(help="Files of traces; two or more are compared.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the HTML file.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title of the report; default: the files' names.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Print it here instead of writing a file.")] = False,
) -> None:
    """Show what a model was unsure of: text by regime, the entropy × varentropy plane, metrics, alternatives."""
    if terminal:
        _print(traces)
        return
    columns = (TextColumn("reading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        sources = [Source(path.name, _reading(path, progress)) for path in traces]
        write_report(output, sources, title or ", ".join(path.stem for path in traces))
    typer.echo(f"wrote {output}")


def _reading(path: Path, progress: Progress) -> Iterator[TraceLine]:
    task = progress.add_task(path.name, total=path.stat().st_size if path.is_file() else None)
    yield from read_traces(path, progress=lambda done: progress.update(task, completed=done))


def _print(paths: list[Path]) -> None:
    console = Console()
    sequences = []
    for path in paths:
        for line in read_traces(path):
            name = f"{line.request_id} #{line.index}" if line.index else line.request_id
            sequence = TracedText(name, line.texts, line.records)
            sequences.append(sequence)
            about = f"{path.name} · {line.preset}, {line.fidelity} · {line.prompt_tokens} + {len(line.token_ids)} tokens"
            # As Text, or brackets in a name would be markup.
            title, subtitle = Text(printable(name), style="bold"), Text(printable(about), style="dim")
            console.print(Panel(coloured(sequence), title=title, subtitle=subtitle, title_align="left", subtitle_align="left"))
    console.print(legend())
    console.print()
    console.print(summary_table(sequences, narrow=console.width < 120))
