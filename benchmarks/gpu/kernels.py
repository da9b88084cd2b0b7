"""Each kernel's time beside its rival and its ceiling: steps of the sampler and of a chain, and attention statistics.

The GPU is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

from benchmarks import attention, sampler
from benchmarks.common import quiet
from benchmarks.gpu.launched import Cost, cost

VOCABULARY = 128_256
# The most telling first: time may end.
ROWS = (256, 64, 1, 1024, 8)
# llama.cpp's default chain, with DRY and XTC on.
CHAIN, CHAIN_ROWS = "chain", (256, 64, 1)
# Rows, context, layers.
SIZES = (
    (256, 1024, 1),
    (64, 8192, 1),
    (64, 1024, 32),
    (64, 1024, 1),
    (1, 32_768, 1),
    (64, 32_768, 1),
    (256, 1024, 8),
    (8, 8192, 32),
)
_DRY_ROWS, _DRY_CHAIN_ROWS = (3, 1), (2,)
_DRY_SIZES = ((3, 20, 1), (2, 40, 2))
_DRY_SHAPE = ("--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--dtype", "float32")


def measure(add: Callable[..., None], *, seconds: float, dry: bool) -> None:
    """Measure all sizes, as far as time allows.

    Args:
        add: writes a result.
        seconds: no size is begun after this many.
        dry: tiny sizes, on a CPU, by Triton's interpreter.

    Raises:
        RuntimeError: a size failed; the others were measured.
    """
    quiet()
    import vllm.platforms

    vllm.platforms.current_platform.import_kernels()
    device = torch.device("cpu" if dry else "cuda")
    end = time.monotonic() + seconds
    failed = 0
    with torch.inference_mode():
        for size, one in _measurements(device, dry):
            if time.monotonic() > end:
                add(**size, skipped=f"{seconds:.0f} s have passed")
                continue
            try:
                add(**size, **one())
            except Exception as error:
                failed += 1
                add(**size, error=f"{type(error).__name__}: {error}"[:500])
            if not dry:
                torch.cuda.empty_cache()
    if failed:
        raise RuntimeError(f"{failed} sizes failed")


def _measurements(device: torch.device, dry: bool) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Sizes, and what measures them: the parts in turn, so that time cuts all short alike."""
    vocabulary = 3000 if dry else VOCABULARY
    asked = sampler.asked_for(CHAIN, sampler.ON, tokens=1024)
    steps = [
        ({"part": "sampler", "rows": rows, "vocabulary": vocabulary}, partial(_of_sampler, rows, vocabulary, device))
        for rows in (_DRY_ROWS if dry else ROWS)
    ]
    chains = [
        ({"part": "chain", "rows": rows, "vocabulary": vocabulary}, partial(_of_sampler, rows, vocabulary, device, asked))
        for rows in (_DRY_CHAIN_ROWS if dry else CHAIN_ROWS)
    ]
    statistics = [
        (
            {"part": "attention", "rows": rows, "context": context, "layers": layers},
            partial(_of_attention, rows, context, layers, device, dry),
        )
        for rows, context, layers in (_DRY_SIZES if dry else SIZES)
    ]
    for together in zip_longest(steps, statistics, chains):
        yield from (one for one in together if one is not None)


def _of_sampler(rows: int, vocabulary: int, device: torch.device, asked: sampler.Asked | None = None) -> dict[str, Any]:
    """Costs of a step and its parts, without those of the copy that puts the logits back; ``asked``: of this chain."""
    step = sampler.step(rows, vocabulary, device, asked)
    if device.type == "cpu":
        from vllm_entropix.distribution.backend import TritonBackend

        step.batch.backend = TritonBackend(device)
    prepared = cost(step.prepare, device)
    costs: dict[str, Cost] = {}
    for name, action in step.actions.items():

        def on_prepared_logits(action: Callable[[], object] = action) -> None:
            step.prepare()
            action()

        costs[name] = cost(on_prepared_logits, device).without(prepared)
    name = "entropix" if asked is None else "chain"
    return {
        "costs": {name: one.told(largest=6) for name, one in costs.items()},
        f"{name}_over_vllm": _ratio(costs[name], costs["vllm"]),
        "metrics_over_read": _ratio(costs["metrics"], costs["read"]),
    }


def _of_attention(rows: int, context: int, layers: int, device: torch.device, dry: bool) -> dict[str, Any]:
    """Costs of the statistics, and of a copy of as many bytes as the keys have."""
    from vllm_entropix.kernels.triton_.attention.workspace import rows_together, workspace_size

    shape = _DRY_SHAPE if dry else ()
    batch = attention.Layers(
        attention.parser().parse_args(["--device", device.type, "--block-size", "16", *shape]), rows, context, layers
    )
    actions, _ = attention.gpu_actions(batch)
    costs = {name: cost(action, device) for name, action in actions.items()}
    workspace = workspace_size(layers, rows, batch.heads, context)
    statistics_ms = costs["statistics"].gpu_ms
    # A copy reads each byte and writes it.
    half = _ratio(costs["copy"], costs["statistics"])
    return {
        "costs": {name: one.told(largest=6) for name, one in costs.items()},
        "keys_gb_per_second": round(batch.key_bytes / statistics_ms / 1e6, 1) if statistics_ms else None,
        "bandwidth_over_copy": None if half is None else round(half / 2, 4),
        "rows_together": rows_together(layers, rows, batch.heads, context, workspace),
        "workspace_mib": round(4 * workspace / 2**20, 1),
    }


def _ratio(ours: Cost, rival: Cost) -> float | None:
    """Of the kernels' times; None where no kernel was seen."""
    return round(ours.gpu_ms / rival.gpu_ms, 4) if rival.gpu_ms else None
