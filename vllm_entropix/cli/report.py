"""``vllm-entropix report``: traces as one HTML file, or in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from vllm_entropix.observability.overview import sequence_title
from vllm_entropix.observability.report import Source, write_report
from vllm_entropix.observability.terminal import TracedText, coloured, legend, printable, summary_table
from vllm_entropix.records.line import TraceLine

PROMPT_CHARACTERS = 1200  # of a prompt in the terminal


def report(
    traces: Annotated[
        list[Path],
        typer.Argument(
            help="Files of traces or of saved HTTP responses, also .gz, and - for standard input; two or more are compared.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the HTML file.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Title of the report; default: the files' names.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="Print it here instead of writing a file.")] = False,
) -> None:
    """Show what a model was unsure of: text by regime, the entropy × varentropy plane, metrics, alternatives."""
    if terminal:
        _print([Source.of_file(path) for path in traces])
        return
    # Names of files are no markup.
    columns = (TextColumn("reading {task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        sources = [Source.of_file(path, _told(path, progress)) for path in traces]
        write_report(output, sources, title or ", ".join(Path(source.name.removesuffix(".gz")).stem for source in sources))
    typer.echo(f"wrote {output}")


def _told(path: Path, progress: Progress) -> Callable[[int], None]:
    task = progress.add_task(printable(path.name), total=path.stat().st_size if path.is_file() else None)
    return lambda done: progress.update(task, completed=done)


def _print(sources: list[Source]) -> None:
    console = Console()
    sequences = []
    for source in sources:
        for line in source.lines:
            if not line.is_answer:  # branches are drawn in the file alone
                continue
            title = sequence_title(line) + (f" #{line.index}" if line.index else "")
            sequence = TracedText(title, line.texts, line.records)
            sequences.append(sequence)
            prompt = [Text(printable(_shortened(line.prompt)), style="dim italic"), Text()] if line.prompt else []
            console.print(
                Panel(
                    Group(*prompt, coloured(sequence)),
                    # As Text, or brackets in a name would be markup.
                    title=Text(printable(title), style="bold"),
                    subtitle=Text(printable(_about(source, line)), style="dim"),
                    title_align="left",
                    subtitle_align="left",
                )
            )
    console.print(legend())
    console.print()
    console.print(summary_table(sequences, console.width))
    for source in sources:
        if source.left_out:
            lines = (
                "1 line that isn't a trace was"
                if source.left_out == 1
                else f"{source.left_out:,} lines that aren't traces were"
            )
            console.print(Text(f"{printable(source.name)}: {lines} left out", "yellow"))


def _shortened(prompt: str) -> str:
    """A prompt, without the middle of a long one."""
    text = prompt.strip()
    if len(text) <= PROMPT_CHARACTERS:
        return text
    half = PROMPT_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _about(source: Source, line: TraceLine) -> str:
    """Where a sequence is from, and how it was made as far as that is known."""
    settings = ", ".join(filter(None, (line.of_sampler(name, str) for name in ("name", "preset", "fidelity"))))
    tokens = f"{line.prompt_tokens} + {len(line.token_ids)} tokens" if line.prompt_tokens else f"{len(line.token_ids)} tokens"
    return " · ".join(filter(None, (source.name, line.request_id, settings, tokens)))
