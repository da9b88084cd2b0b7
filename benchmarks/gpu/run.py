"""Runs steps: their processes, their limits, and what is written down about both."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.results import Results
from benchmarks.gpu.steps import DRY_PATIENCE, ROOT, STEPS, Job, Wishes, jobs_of
from tests.support import runners

# What a process that is told to end may still take, seconds.
_GRACE = 5.0
_POLL = 0.1
_SAID = 1000
# Nothing is fetched or sent.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

# An exit status, or what kept a process from having one.
Status = int | Literal["late", "skipped"]


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float
    status: Status | None = None


@dataclass
class Run:
    """One after the other, the steps of a run.

    Attributes:
        folder: of results and logs.
        wishes: of the command line.
        budget: seconds for all steps; None for as many as they take.
        patience: factor on the steps' limits.
        say: is told of each step.
    """

    folder: Path
    wishes: Wishes = field(default_factory=Wishes)
    budget: float | None = None
    patience: float = 1.0
    say: Callable[[str], None] = print
    failed: set[str] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)

    @property
    def results(self) -> Results:
        """What the run's processes have found."""
        return Results(self.folder / "results.jsonl")

    def left(self) -> float:
        """Seconds of the budget."""
        return float("inf") if self.budget is None else self.budget - (time.monotonic() - self.started)

    def step(self, name: str) -> bool:
        """Do a step, unless time is short or a step that it needs has failed; did all of it succeed?"""
        step = STEPS[name]
        missing = [needed for needed in step.needs if needed in self.failed]
        if missing or self.left() < step.least:
            why = f"{missing[0]} failed" if missing else f"{self.left():.0f} s left of {self.budget:.0f}"
            self._note(name, "skipped", 0.0, why)
            self.failed.add(name)
            return False
        factor = DRY_PATIENCE if self.wishes.dry else self.patience
        limit = min(step.limit * factor, self.left())
        self.say(f"{name}: {step.about}; at most {limit:.0f} s")
        with tempfile.TemporaryDirectory(prefix="entropix-gpu-", ignore_cleanup_errors=True) as scratch:
            jobs = list(jobs_of(name, self.wishes, self.results.file, Path(scratch)))
            statuses = self._run(jobs, limit)
        succeeded = all(status == 0 for status in statuses)
        if not succeeded:
            self.failed.add(name)
        return succeeded

    def _run(self, jobs: list[Job], limit: float) -> list[Status]:
        """Run processes side by side; their statuses."""
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(self._started(job, logs / f"{job.name}.log")) for job in jobs]
            deadline = time.monotonic() + limit
            while waiting := [one for one in running if one.status is None]:
                late = time.monotonic() > deadline
                ended = [one for one in waiting if late or one.process.poll() is not None]
                statuses: dict[str, Status] = {
                    one.job.name: "late" if (code := one.process.poll()) is None else code for one in ended
                }
                _end([one.process for one in ended])
                for one in ended:
                    one.status = statuses[one.job.name]
                    self._finish(one)
                time.sleep(_POLL)
        return [one.status for one in running if one.status is not None]

    @contextlib.contextmanager
    def _started(self, job: Job, log: Path) -> Iterator[_Running]:
        """A process in a session of its own, of which nothing is left at the end."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                job.words,
                cwd=ROOT,
                env={**self._environment(), **job.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        running = _Running(job, process, time.monotonic())
        try:
            yield running
        finally:
            if running.status is None:
                _end([process])

    def _environment(self) -> dict[str, str]:
        # What a GPU runs, on a CPU: Model Runner V2, its kernels and ours in Triton's interpreter.
        own = runners.environment("v2") if self.wishes.dry else dict(os.environ)
        # vLLM takes it for granted on a GPU, and then ends without it.
        if importlib.util.find_spec("flashinfer") is None:
            own.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        return own | {name: own.get(name, value) for name, value in _OFFLINE.items()}

    def _finish(self, one: _Running) -> None:
        assert one.status is not None
        if one.job.report is not None:
            self.results.add(one.job.name, **read_report(one.job.report))
        self._note(one.job.name, one.status, time.monotonic() - one.started)

    def _note(self, job: str, status: Status, seconds: float, why: str | None = None) -> None:
        reason = {} if why is None else {"why": why}
        self.results.add(job, status=status, seconds=round(seconds, 1), **reason)
        self.say(f"{job}: {'ok' if status == 0 else f'status {status}'} after {seconds:.0f} s{f', {why}' if why else ''}")


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End processes and all that they started, so that their memory is free for the next."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + _GRACE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


def read_report(file: Path) -> Mapping[str, Any]:
    """What a JUnit report of pytest says: counts, and of each test that didn't pass, or that told something, what it said."""
    try:
        cases = list(ET.parse(file).getroot().iter("testcase"))
    except (FileNotFoundError, ET.ParseError):
        return {"error": "pytest left no report"}
    found: dict[str, list[dict[str, Any]]] = {"failed": [], "skipped": [], "told": []}
    for case in cases:
        name = case.get("name")
        told = {one.get("name", ""): one.get("value") for one in case.iter("property")}
        if told:
            found["told"].append({"test": name, **told})
        for kind, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
            for one in (tag for tag in map(case.find, tags) if tag is not None):
                said = one.get("message") or one.text or ""
                found[kind].append({"test": name, "said": said[:_SAID]})
    without = {one["test"] for kind in ("failed", "skipped") for one in found[kind]}
    return {"passed": len(cases) - len(without), **found}


def fresh(folder: Path) -> None:
    """Make a folder for a run's results.

    Raises:
        FileExistsError: it has results of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "results.jsonl").exists():
        raise FileExistsError(folder)
