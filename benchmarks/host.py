"""What a step's own Python takes of the host where a GPU runs it, without one: Triton's launches are left out."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import add_out, finish, integers, quiet


class Counted(TorchDispatchMode):
    """How many operations of PyTorch ran while it is open, views and allocations among them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def without_launches() -> Iterator[list[str]]:
    """Take a CPU for a GPU, and note the names of the kernels instead of launching them."""
    from triton.runtime.jit import JITFunction

    from vllm_entropix.attention import launches, observer
    from vllm_entropix.distribution import backend

    launched: list[str] = []
    with ExitStack() as stack:
        for module in (backend, launches, observer):
            stack.enter_context(mock.patch.object(module, "kernels_for", _those_of_a_gpu))
        noted = mock.patch.object(JITFunction, "__getitem__", lambda kernel, grid: _noted(launched, kernel.fn.__name__))
        stack.enter_context(noted)
        yield launched


def _those_of_a_gpu(device: torch.device) -> str:
    return "triton"


def _noted(launched: list[str], name: str) -> Callable[..., None]:
    return lambda *args, **kwargs: launched.append(name)


def attention(layers: int, rows: int, context: int) -> Callable[[], object]:
    """Statistics of a step of the shape of Llama-3.1-8B, of so many observed layers."""
    from vllm_entropix import EntropixConfig
    from vllm_entropix.attention import AttentionObserver, LayerAttention
    from vllm_entropix.attention.observer import _Step
    from vllm_entropix.attention.paged_keys import PlainKeys

    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    shape = {"num_heads": 32, "head_size": 128, "query_quant": None, "attn_backend": backend}
    modules = {index: SimpleNamespace(layer_name=f"layers.{index}", kv_cache=object(), **shape) for index in range(layers)}
    observer = AttentionObserver(modules, EntropixConfig(), max_requests=rows)
    observer.reserve(torch.bfloat16, torch.device("cpu"), 4 * context)
    for index, module in modules.items():
        keys = PlainKeys(torch.zeros(10, 8, 16, 128, dtype=torch.bfloat16), 128)
        observer._attention[index] = (module.kv_cache, LayerAttention(keys, 0.1))
    table = torch.zeros(rows, 4 * context // 16, dtype=torch.int32)
    starts, lengths = torch.arange(rows + 1, dtype=torch.int32), torch.full((rows,), context, dtype=torch.int32)
    requests, positions = torch.arange(rows), torch.full((rows,), context - 1)
    wanted = torch.ones(rows, dtype=torch.bool)

    def step() -> object:
        # As an engine gives it: views that are made anew.
        described = _Step(starts[: rows + 1], lengths[:rows], table[:rows], rows, context, None)
        observer._steps.update(dict.fromkeys(modules, described))
        return observer.statistics(requests, positions, wanted)

    return step


def measure(name: str, action: Callable[[], object], launched: list[str], repeats: int) -> dict[str, object]:
    """Median of rounds of 100 calls each, of the processor's time."""
    action()  # makes what is kept from step to step
    rounds = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(100):
            action()
        rounds.append((time.process_time() - begin) * 10)
    launched.clear()
    with Counted() as counted:
        action()
    ms = {"median": round(statistics.median(rounds), 4), "least": round(min(rounds), 4)}
    return {"what": name, "ms": ms, "operations": counted.number, "launches": len(launched)}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--rows", type=int, default=256, help="of a step (default: 256)")
    parser.add_argument("--layers", type=integers, default=[1, 32], help="observed layers, comma-separated (default: 1,32)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of 100 steps (default: 9)")
    add_out(parser)
    options = parser.parse_args()
    quiet()
    import vllm.platforms

    from benchmarks import sampler

    vllm.platforms.current_platform.import_kernels()
    results = []
    with torch.inference_mode(), without_launches() as launched:
        step = sampler.step(options.rows, 128256, torch.device("cpu"))
        results.append(measure("sampler step without the draw", step.actions["transform"], launched, options.repeats))
        for layers in options.layers:
            one = attention(layers, options.rows, 1024)
            results.append(measure(f"attention statistics, layers: {layers}", one, launched, options.repeats))
    finish("host", results, options.out)


if __name__ == "__main__":
    main()
