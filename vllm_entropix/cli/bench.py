"""``vllm-entropix bench``: a fair test of samplers, and its report."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from vllm_entropix.settings.errors import ConfigError


class _RunUnlessNamed(TyperGroup):
    """`bench STUDY.toml` runs a study: what isn't a command's name is an argument of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return list(super().parse_args(ctx, args))


bench = typer.Typer(
    cls=_RunUnlessNamed,
    no_args_is_help=True,
    help="Test samplers fairly: equally many random configurations of each, tuned on one split and judged on another.",
)


@bench.command()
def run(
    study: Annotated[Path, typer.Argument(help="Study file (.toml, .yaml or .json).", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results; a study goes on in its own.")],
    model: Annotated[str | None, typer.Option(help="Only this model of the study.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Only this sampler of the study.")] = None,
    task: Annotated[str | None, typer.Option(help="Only this task of the study.")] = None,
    chosen: Annotated[
        Path | None, typer.Option(help="chosen.json of a study: run its test split alone, without tuning anew.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only read the study, and say how many answers it asks for.")] = False,
) -> None:
    """Run a study, or go on with it: `vllm-entropix bench STUDY.toml -o results/`."""
    _require()
    from vllm_entropix.bench.run import Only, read_chosen
    from vllm_entropix.bench.run import run as run_study
    from vllm_entropix.bench.study import Study

    found = Study.load(study)
    if check:
        typer.echo(_size(found))
        return
    wanted = read_chosen(chosen) if chosen is not None else None
    with _ended_by_sigterm():
        answers = run_study(found, output, Console(stderr=True), Only(model, sampler, task), wanted)
    typer.echo(f"{output} has {answers:,} answers; `vllm-entropix bench report {output}` shows them")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as Ctrl-C does: a server that was started for the study ends with it."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _size(study: Any) -> str:
    splits = {name: study.split(name) for name in study.tasks}
    items = {phase: sum(len(split.of(phase)) for split in splits.values()) for phase in ("tuning", "test")}
    asking = {name: arm for name, arm in study.samplers.items() if arm.majority_of is None}
    tuned = {name: len(study.parameters(name)) for name, arm in asking.items() if arm.control_of is None}
    answers = 0
    for model in study.models:
        here = [name for name in asking if study.runs(name, model)]
        answers += items["tuning"] * sum(tuned.get(name, 0) for name in here)
        answers += items["test"] * sum(study.draws_of(name, "test") for name in here)
    return (
        f"{len(study.models)} models; {items['tuning']} items to tune on and {items['test']} to test on, "
        f"of {len(splits)} tasks; "
        f"{sum(tuned.values())} configurations of {len(study.samplers)} samplers; "
        f"{answers:,} answers"
    )


def _require() -> None:
    for package in ("numpy", "scipy", "openai"):
        try:
            __import__(package)
        except ImportError:
            raise ConfigError(f"bench needs the package {package}; pip install vllm-entropix[bench]") from None


@bench.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder that a study wrote.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the report; default: the results'.")] = None,
    into: Annotated[
        list[Path] | None, typer.Option(help="Also write parts of the report into this document, where its marks say.")
    ] = None,
) -> None:
    """Show what a study found so far: an HTML page, tables in Markdown, and every figure in JSON."""
    _require()
    from vllm_entropix.bench.report import filled, findings, write
    from vllm_entropix.bench.summary import summarise

    with Console(stderr=True).status("Computing intervals ..."):
        summary = summarise(results)
        written = write(summary, output or results)
    for document in into or []:
        try:
            document.write_text(filled(document.read_text(encoding="utf-8"), summary), encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't write the report into {document}: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{document}: {error}") from None
        written.append(document)
    for sentence in findings(summary):
        typer.echo(sentence)
    typer.echo(f"wrote {', '.join(map(str, written))}")
