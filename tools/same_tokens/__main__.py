"""``python -m tools.same_tokens``: record what real engines answer before a change and after it, and compare.

::

    git worktree add ../before COMMIT
    python -m tools.same_tokens record before.json.gz --checkout ../before
    python -m tools.same_tokens compare before.json.gz

Tokens, log-probabilities and traces are compared bit for bit. Other machines round otherwise: make both recordings on one, with
the same packages.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from tools.same_tokens.checkout import ROOT, CheckoutError, digest, environment, install
from tools.same_tokens.parts import PARTS, Part
from tools.same_tokens.recording import Comparison, Recording, RecordingError, Summary

_terminal = Console(stderr=True)
_SHOWN = 20
_LOG_END = 3000

application = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)


class PartError(Exception):
    """A part's process failed; the message is the end of its log."""


def _machine() -> dict[str, Any]:
    from benchmarks.common import machine  # torch

    return {name: value for name, value in machine().items() if name not in ("date", "commit", "vllm_entropix")}


def _part(name: str, part: Part, scratch: Path) -> dict[str, Any]:
    """The answers of one part, from a process of its own."""
    answers, log = scratch / "answers.json", scratch / "log"
    command = [sys.executable, "-P", "-m", "tools.same_tokens.generate", name, str(scratch / "random"), str(answers)]
    with log.open("w") as output:
        process = subprocess.run(
            command, cwd=scratch, env=environment(part, scratch / "package"), stdout=output, stderr=output, check=False
        )
    if process.returncode != 0:
        raise PartError(log.read_text(errors="replace")[-_LOG_END:])
    return dict(json.loads(answers.read_text(encoding="utf-8")))


def _begin(file: Path, checkout: Path) -> Recording:
    """The recording in the file, if it may be gone on with; otherwise an empty one."""
    about = {"code": digest(checkout), "requests": {name: part.digest() for name, part in PARTS.items()}, "machine": _machine()}
    if not file.exists():
        return Recording(about)
    recording = Recording.read(file)
    for what, value in about.items():
        if recording.about.get(what) != value:
            raise RecordingError(f"{file} was recorded with another {what}: remove it, or name another file")
    return recording


def _record(file: Path, checkout: Path, names: Sequence[str]) -> Recording:
    """Record the parts of these names that the file hasn't yet, one after the other."""
    recording = _begin(file, checkout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=_terminal) as progress,
    ):
        scratch = Path(folder)
        (scratch / "package").mkdir()
        install(checkout, scratch / "package")
        task = progress.add_task("", total=sum(PARTS[name].requests for name in names))
        for name in names:
            part = PARTS[name]
            progress.update(task, description=name)
            if name not in recording.parts:
                if part.model == "random" and not (scratch / "random").exists():
                    from tests.support.models import tiny_llama  # torch and transformers

                    tiny_llama(scratch / "random")
                start = time.monotonic()
                recording.parts[name] = _part(name, part, scratch)
                recording.write(file)
                progress.console.print(f"{name}: {time.monotonic() - start:.0f} s")
            progress.advance(task, part.requests)
    return recording


def _show(recording: Recording) -> None:
    table = Table("part", "requests", "tokens", "records", "forced", "regimes", Column("digest", no_wrap=True))
    for name, answers in recording.parts.items():
        one = Summary.of(answers)
        regimes = ", ".join(f"{regime} {count}" for regime, count in one.regimes.items())
        table.add_row(name, str(one.requests), str(one.tokens), str(one.records), str(one.forced), regimes, one.digest)
    Console().print(table)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors in words, and the status 2."""
    try:
        yield
    except (CheckoutError, RecordingError) as error:
        _terminal.print(escape(str(error)), style="red")
        raise typer.Exit(2) from None
    except PartError as error:
        _terminal.print(f"the engine's process failed:\n{escape(str(error))}", style="red")
        raise typer.Exit(2) from None


FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The recording, JSON that gzip packed.")]
CheckoutOption = Annotated[Path, typer.Option(help="The checkout whose code answers; default: this one.", show_default=False)]


@application.command()
def record(
    file: FileArgument,
    checkout: CheckoutOption = ROOT,
    part: Annotated[list[str] | None, typer.Option(help="Only this part; may be given several times.")] = None,
) -> None:
    """Record the answers to all requests; a file that isn't whole is gone on with."""
    unknown = sorted(set(part or ()) - PARTS.keys())
    if unknown:
        raise typer.BadParameter(f"there is no part {unknown[0]!r}; there are {', '.join(map(repr, PARTS))}")
    with _told():
        _show(_record(file, checkout, part or list(PARTS)))


@application.command()
def compare(
    before: FileArgument,
    after: Annotated[Path | None, typer.Argument(metavar="[FILE2]", help="Default: recorded now, with this checkout.")] = None,
) -> None:
    """Compare two recordings; ends with status 1 if an answer differs."""
    with _told():
        first = Recording.read(before)
        if after is None:
            with tempfile.TemporaryDirectory() as folder:
                second = _record(Path(folder) / "now.json.gz", ROOT, list(first.parts))
        else:
            second = Recording.read(after)
    for what in ("machine", "requests"):
        if first.about.get(what) != second.about.get(what):
            _terminal.print(f"the recordings were made with another {what}", style="yellow")
    found = Comparison.of(first, second)
    _show(second)
    if found.further:
        _terminal.print(f"only the second has: {', '.join(sorted(found.further))}")
    requests = sum(map(len, first.parts.values()))
    if not found.different:
        print(f"all {requests} requests are answered alike, bit for bit")
        return
    for request, (place, one, other) in list(found.different.items())[:_SHOWN]:
        _terminal.print(escape(f"{request}: {place}: {one} before, {other} after"))
    print(f"{len(found.different)} of {requests} requests are answered otherwise")
    raise typer.Exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # takes the part's process along
    application()
