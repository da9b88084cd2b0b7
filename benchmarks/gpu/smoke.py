"""Does the machine run the project at all: the card, the packages, the plugin, one kernel."""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import seconds
from benchmarks.gpu.steps import ROOT

_PACKAGES = ("transformers", "numpy", "numba", "pytest", "flashinfer-python")
_GROUP, _NAME = "vllm.general_plugins", "entropix"
# Kernels and PyTorch in float64 differ by rounding.
_TOLERANCE = 1e-3


def measure(add: Callable[..., None], *, dry: bool) -> None:
    """Describe the machine, then hold it to what everything else needs.

    Args:
        add: writes a result.
        dry: on a CPU.

    Raises:
        RuntimeError: the plugin isn't this checkout's, or a kernel computes something else than PyTorch.
    """
    add(packages={name: _version(name) for name in _PACKAGES}, card={} if dry else _card())
    add(plugin=_plugin())
    import vllm.platforms

    vllm.platforms.current_platform.import_kernels()
    add(platform=type(vllm.platforms.current_platform).__name__)
    device = torch.device("cpu" if dry else "cuda")
    add(bandwidth=_bandwidth(device, 1 << 20 if dry else 4 << 30))
    error = _error_of_metrics(device, 3000 if dry else 128_256)
    add(metrics_error=error)
    if not error < _TOLERANCE:
        raise RuntimeError(f"the kernel's metrics differ by {error:.3g} from PyTorch's, and {_TOLERANCE} is allowed")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    card: dict[str, Any] = {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "l2_mib": round(found.L2_cache_size / 2**20, 1),
    }
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version,memory.used,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return card
    return card | dict(zip(("driver", "memory_used", "clock", "memory_clock"), said.split(", "), strict=False))


def _plugin() -> str:
    """Where the package is that vLLM's processes load."""
    import vllm_entropix

    folder = Path(vllm_entropix.__file__).resolve().parent
    names = {entry.name for entry in importlib.metadata.entry_points(group=_GROUP)}
    if _NAME not in names or folder.parent != ROOT:
        raise RuntimeError(f"vLLM doesn't load the plugin of {ROOT}: install it, pip install --no-deps --editable .")
    return str(folder.relative_to(ROOT))


def _bandwidth(device: torch.device, size: int) -> dict[str, float]:
    """Bytes that the card reads and writes in a second at most, 10¹²: a ceiling of everything that follows."""
    source = torch.zeros(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    actions = {"copy": (lambda: target.copy_(source), 2 * size), "read": (lambda: source.sum(), size)}
    return {
        name: round(moved / statistics.median(seconds(action, device.type == "cuda") for _ in range(20)) / 1e12, 3)
        for name, (action, moved) in actions.items()
    }


def _error_of_metrics(device: torch.device, vocabulary: int) -> float:
    from vllm_entropix.distribution.statistics import LogitsMetrics
    from vllm_entropix.kernels.triton_.logits_metrics import logits_metrics

    logits = torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(0)).to(device) * 4
    want = LogitsMetrics.from_logits(logits.double())
    got = logits_metrics(logits)[:3]
    exact = (want.entropy, want.varentropy, want.log_normaliser)
    return max((one.double() - other).abs().max().item() for one, other in zip(got, exact, strict=True))
