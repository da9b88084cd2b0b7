"""What an action costs a GPU and its host: kernels by the profiler, and time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

_NAME = 80  # characters of a kernel's name
_LARGEST = 24


@dataclass(frozen=True)
class Cost:
    """Costs of one repetition.

    Attributes:
        gpu_ms: the kernels' times together, without the gaps between them.
        kernels: how many were launched.
        wall_ms: with launches, which the host makes ahead: the greater of the host's time and the GPU's.
        largest: milliseconds and launches of the kernels that take most, by name.
    """

    gpu_ms: float
    kernels: float
    wall_ms: float
    largest: dict[str, tuple[float, float]]

    def without(self, part: Cost) -> Cost:
        """What is left if a part of it is taken away; its own kernels stay among the largest."""
        wall = max(0.0, self.wall_ms - part.wall_ms)
        return Cost(max(0.0, self.gpu_ms - part.gpu_ms), self.kernels - part.kernels, wall, self.largest)

    def told(self, largest: int = _LARGEST) -> dict[str, Any]:
        """For a result, rounded."""
        rounded = {name: round(value, 4) for name, value in asdict(self).items() if name != "largest"}
        return rounded | {"largest": dict(list(self.largest.items())[:largest])}


def cost(action: Callable[[], object], device: torch.device, repeats: int = 5, warm_up: int = 3) -> Cost:
    """Cost of an action: once by the clock, and then by the profiler, which slows the host.

    Without a GPU there are no kernels to be seen, and each is done once.
    """
    on_gpu = device.type == "cuda"
    if not on_gpu:
        repeats, warm_up = 1, 0
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    for _ in range(warm_up):
        action()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    wait()
    wall = (time.perf_counter() - start) / repeats * 1e3
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(repeats):
            action()
        wait()
    found: dict[str, tuple[float, float]] = {}
    for event in profile.key_averages():
        if event.self_device_time_total:
            ms, launches = found.get(event.key[:_NAME], (0.0, 0.0))
            found[event.key[:_NAME]] = ms + event.self_device_time_total / repeats / 1e3, launches + event.count / repeats
    ordered = sorted(found.items(), key=lambda one: -one[1][0])
    largest = {name: (round(ms, 4), round(launches, 2)) for name, (ms, launches) in ordered[:_LARGEST]}
    return Cost(sum(ms for ms, _ in found.values()), sum(launches for _, launches in found.values()), wall, largest)
