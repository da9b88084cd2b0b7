"""What there is to do on a GPU: steps, each of one or several processes side by side, and plans, which name steps.

Imports nothing heavy. Limits are those of one H100-class GPU whose machine reads packages from a local disk.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.modes import DRY_RUN, MODES

ROOT = Path(__file__).resolve().parents[2]
# On a CPU, by Triton's interpreter: where an engine stands for all modes, and how much longer everything may take.
DRY_MODE = "flash-attn"
DRY_PATIENCE = 6.0

_TESTS = "tests/gpu"
# Processes that share the tests of kernels: most of their time is compilation, on the CPU.
_SIDE_BY_SIDE = 5
# Seconds that a test may take in which nothing is wrong.
_TEST_SECONDS = 150


@dataclass(frozen=True)
class Wishes:
    """What was asked for on the command line.

    Attributes:
        dry: tiny sizes on a CPU, to find errors in this code.
        select: pytest's expression; only these tests of kernels, up to the first that fails.
        modes: of engines that are tested.
    """

    dry: bool = False
    select: str | None = None
    modes: tuple[str, ...] = tuple(MODES)


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: of its lines in the results, and of its log.
        command: what follows the interpreter.
        environment: what is added to the run's own.
        report: the JUnit report that pytest leaves; None for a process that writes its results by itself.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    report: Path | None = None

    @property
    def words(self) -> list[str]:
        """The whole command."""
        return [sys.executable, *self.command]


@dataclass(frozen=True)
class Step:
    """Something to do, which costs the next steps nothing if it fails.

    Attributes:
        about: one line.
        limit: seconds until its processes are ended.
        least: it isn't begun with fewer seconds left.
        needs: steps that mustn't have failed.
    """

    about: str
    limit: float
    least: float
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement(Step):
    """A module of this package in a process of its own.

    Attributes:
        module: whose ``measure`` is called.
        options: what it is called with.
        dry: what it is called with in a dry run, beside ``dry``.
    """

    module: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    dry: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tests(Step):
    """Tests of ``tests/gpu``.

    Attributes:
        kernels: those of kernels.
        engines: those of an engine's modes, each in a process.
    """

    kernels: bool = False
    engines: bool = False


def _throughput(side: str, requests: list[int], rounds: int, limit: float, least: float, needs: tuple[str, ...] = ()) -> Step:
    return Measurement(
        f"tokens per second of the 8B shape, {side}, {' and '.join(map(str, requests))} requests",
        limit,
        least,
        ("smoke", *needs),
        module="throughput",
        options={"side": side, "requests": requests, "rounds": rounds},
        dry={"requests": [3], "context": 20, "tokens": 5, "rounds": 1},
    )


def _decode(side: str) -> Step:
    return Measurement(
        f"decoding steps of the 8B shape with four layers, 256 requests, {side}: kernels, times, memory",
        130,
        70,
        ("smoke",),
        module="decode",
        options={"side": side},
        dry={"requests": 3, "context": 40, "steps": 3},
    )


STEPS: dict[str, Step] = {
    "smoke": Measurement("the card, the packages, the plugin, a kernel", 100, 20, module="smoke"),
    "tests": Tests("kernels against PyTorch, engines against transformers, side by side", 170, 30, kernels=True, engines=True),
    "kernel-tests": Tests("kernels against PyTorch", 150, 30, kernels=True),
    "engine-tests": Tests("engines against transformers", 150, 30, ("smoke",), engines=True),
    "kernels": Measurement(
        "each kernel's time beside its ceiling", 95, 30, module="kernels", options={"seconds": 70}, dry={"seconds": 600}
    ),
    "throughput-vllm": _throughput("vllm", [64], 3, 140, 75),
    "throughput-last": _throughput("last", [64], 3, 130, 60, ("throughput-vllm",)),
    "decode-vllm": _decode("vllm"),
    "decode-last": _decode("last"),
    "decode-all": _decode("all"),
    "decode-trace": _decode("trace"),
    "rates-vllm": _throughput("vllm", [64, 256], 2, 170, 80),
    "rates-last": _throughput("last", [64, 256], 2, 150, 70, ("rates-vllm",)),
    "rates-all": _throughput("all", [64, 256], 2, 160, 70, ("rates-vllm",)),
    "rates-trace": _throughput("trace", [64, 256], 2, 150, 70, ("rates-vllm",)),
}
PLANS: dict[str, tuple[str, ...]] = {
    "first": ("smoke", "tests", "kernels", "throughput-vllm", "throughput-last", "decode-vllm", "decode-last"),
    "rates": ("rates-vllm", "rates-last", "rates-all", "rates-trace", "decode-all", "decode-trace"),
    "failures": ("kernel-tests", "engine-tests"),
}


def expanded(names: Iterable[str]) -> list[str]:
    """Steps of these names, each once, in place of plans those that they name.

    Raises:
        ValueError: there is no such step or plan.
    """
    steps: dict[str, None] = {}
    for name in names:
        if name not in PLANS and name not in STEPS:
            raise ValueError(f"there is no step or plan {name[:100]!r}; there are {', '.join((*PLANS, *STEPS))}")
        steps.update(dict.fromkeys(PLANS.get(name, (name,))))
    return list(steps)


def jobs_of(name: str, wishes: Wishes, results: Path, scratch: Path) -> Iterator[Job]:
    """The processes of a step.

    Args:
        name: of the step.
        wishes: of the command line.
        results: the file that they write to.
        scratch: a folder for what nobody reads afterwards.
    """
    step = STEPS[name]
    if isinstance(step, Measurement):
        options = {**step.options, **(step.dry if wishes.dry else {}), "dry": wishes.dry}
        yield Job(name, ("-m", "benchmarks.gpu.worker", name, step.module, json.dumps(options), str(results)))
    elif isinstance(step, Tests):
        if step.kernels:
            yield _kernel_tests(wishes, scratch)
        if step.engines:
            yield from (_engine_test(mode, wishes, scratch) for mode in ([DRY_MODE] if wishes.dry else wishes.modes))


def _pytest(name: str, wishes: Wishes, scratch: Path, arguments: Iterable[str], environment: Mapping[str, str]) -> Job:
    report, seconds = scratch / f"{name}.xml", _TEST_SECONDS * (DRY_PATIENCE if wishes.dry else 1)
    options = (
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        f"timeout={seconds}",
        "-o",
        "junit_family=xunit1",
        "--durations=5",
        f"--junitxml={report}",
    )
    return Job(name, ("-m", "pytest", *arguments, *options), environment, report)


def _kernel_tests(wishes: Wishes, scratch: Path) -> Job:
    selected: tuple[str, ...] = ()
    if wishes.select:
        selected = ("-x", "-k", wishes.select)
    elif importlib.util.find_spec("xdist") is not None:
        selected = ("-n", str(_SIDE_BY_SIDE))
    # Compiled kernels can't run on a CPU, where CI has the same checks interpreted.
    if wishes.dry:
        selected = ("--collect-only",)
    return _pytest("kernel-tests", wishes, scratch, (f"{_TESTS}/test_kernels.py", *selected), {})


def _engine_test(mode: str, wishes: Wishes, scratch: Path) -> Job:
    # What engines compile at the same time mustn't be written to one place.
    environment = {"VLLM_CACHE_ROOT": str(scratch / f"vllm-{mode}"), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    if wishes.dry:
        environment[DRY_RUN] = "1"
    return _pytest(f"engine-{mode}", wishes, scratch, (f"{_TESTS}/test_engine.py::test_mode[{mode}]",), environment)
