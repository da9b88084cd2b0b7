"""``python -m benchmarks.gpu``: all that only a GPU can tell, within a limit of time, on a machine without a network.

::

    python -m benchmarks.gpu --dry                              # without a GPU, tiny sizes: finds errors in the commands
    python -m benchmarks.gpu first --budget 480                 # does it run, is it right, how fast is it
    python -m benchmarks.gpu rates                              # 256 requests, all layers, traced
    python -m benchmarks.gpu kernel-tests --select "metrics"    # after a failure
    python -m benchmarks.gpu engine-tests --mode window

Each process writes what it finds to results.jsonl at once; summary.md says all of it in tables. Compare figures of one run
alone: another card, or another hour, gives others.
"""

from __future__ import annotations

import datetime
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.gpu.run import Run, fresh
from benchmarks.gpu.steps import PLANS, ROOT, STEPS, Wishes, expanded
from benchmarks.gpu.tables import summary
from tests.gpu.modes import MODES


def _listed() -> str:
    lines = [f"plan  {name:16} {', '.join(steps)}" for name, steps in PLANS.items()]
    return "\n".join([*lines, *(f"step  {name:16} {step.about} (at most {step.limit:.0f} s)" for name, step in STEPS.items())])


def _machine() -> dict[str, Any]:
    """What the machine is; asked in a process of its own, since this one must hold nothing of the GPU's memory."""
    command = [sys.executable, "-m", "benchmarks.common"]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise typer.Exit(1)
    described: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return described


def _default_folder() -> Path:
    return ROOT / "out" / "gpu" / datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Plans or steps; default: first.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results and logs; default: out/gpu/ and the time.", show_default=False)
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=1, help="Seconds for all steps together; default: as many as their limits allow.")
    ] = None,
    patience: Annotated[float, typer.Option(min=0.1, help="Factor on the steps' limits, which are those of one H100.")] = 1.0,
    dry: Annotated[bool, typer.Option("--dry", help="Tiny sizes on a CPU, to find errors in the commands.")] = False,
    select: Annotated[
        str | None, typer.Option(help="Only these tests of kernels, as pytest's -k has it; ends with the first that fails.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="Only this mode of engines that are tested; may be given several times.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show plans and steps, and end.")] = False,
) -> None:
    """Run plans or steps on a GPU; ends with status 1 if something failed."""
    if listing:
        print(_listed())
        return
    unknown = sorted(set(mode or ()) - MODES.keys())
    if unknown:
        raise typer.BadParameter(f"there is no mode {unknown[0][:100]!r}; there are {', '.join(MODES)}")
    try:
        steps = expanded(names or ["first"])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    machine = _machine()
    if not dry and "gpu" not in machine:
        print("There is no NVIDIA GPU here. --dry looks for errors without one.", file=sys.stderr)
        raise typer.Exit(1)
    folder = (out or _default_folder()).resolve()
    try:
        fresh(folder)
    except FileExistsError:
        raise typer.BadParameter(f"{str(folder)[:100]} has results of another run; name another folder by --out") from None
    run = Run(folder, Wishes(dry, select, tuple(mode or MODES)), budget, patience, lambda said: print(said, flush=True))
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    run.results.add("run", command=command, machine=machine, steps=steps, dry=dry)
    try:
        for name in steps:
            run.step(name)
    finally:
        text = summary(run.results.lines())
        (folder / "summary.md").write_text(text, encoding="utf-8")
        print(f"\n{text}\n{folder}", flush=True)
    if run.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the steps' processes as well
    typer.run(main)
