"""``vllm-entropix`` and its commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vllm_entropix._version import __version__
from vllm_entropix.cli import calibrate, demo, doctor, export, presets, report, schema, whatif
from vllm_entropix.config import ConfigError
from vllm_entropix.observability.tracefile import TraceFileError

app = typer.Typer(
    name="vllm-entropix",
    help="Entropix sampling inside vLLM: see what a model is unsure of, token by token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("calibrate")(calibrate.calibrate)
app.command("doctor")(doctor.doctor)
app.command("presets")(presets.presets)
app.command("report")(report.report)
app.command("whatif")(whatif.whatif)
app.command("export")(export.export)
app.command("schema")(schema.schema)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vllm-entropix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options of all commands."""


def main() -> None:
    """Entry point: a wrong setting ends in one line and status 1."""
    try:
        app()
    except (ConfigError, TraceFileError) as error:
        sys.exit(f"vllm-entropix: {error}")


if __name__ == "__main__":
    main()
