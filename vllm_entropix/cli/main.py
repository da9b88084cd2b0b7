"""``vllm-entropix`` and its commands."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from vllm_entropix._version import __version__
from vllm_entropix.cli import bench, calibrate, demo, doctor, export, presets, report, samplers, schema, scores, whatif
from vllm_entropix.observability.tracefile import TraceFileError
from vllm_entropix.settings.errors import ConfigError

app = typer.Typer(
    name="vllm-entropix",
    help="Entropix sampling inside vLLM: see what a model is unsure of, token by token.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("calibrate")(calibrate.calibrate)
app.command("doctor")(doctor.doctor)
app.command("presets")(presets.presets)
app.command("samplers")(samplers.samplers)
app.command("report")(report.report)
app.command("whatif")(whatif.whatif)
app.command("export")(export.export)
app.command("scores")(scores.scores)
app.command("schema")(schema.schema)
app.add_typer(bench.bench, name="bench")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vllm-entropix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options of all commands."""


_NOT_OURS = ("torch", "vllm")  # what commands import that our own requirements don't bring


def main() -> None:
    """Entry point: what goes wrong ends in one sentence and status 1; a wrong option, in status 2."""
    # What an encoding lacks is shown as "?": a sign in a table is no reason to fail.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk or a closed pipe can be told
    except BrokenPipeError:
        _abandon_output()
        sys.exit(1)  # as `head` wants it: without a word
    except KeyboardInterrupt:
        sys.exit(130)
    except (ConfigError, TraceFileError) as error:
        sys.exit(f"vllm-entropix: {error}")
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _NOT_OURS:
            raise
        sys.exit(f"vllm-entropix: {name} isn't installed; `vllm-entropix doctor` says what is, and how to get the rest")
    except OSError as error:
        _abandon_output()
        sys.exit(f"vllm-entropix: {_place(error)}{error.strerror or error}")


def _place(error: OSError) -> str:
    if error.filename is None:
        return ""
    return f"{error.filename}: "


def _abandon_output() -> None:
    """What is left to be written goes nowhere, or the interpreter tries again, and complains, when it ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    main()
