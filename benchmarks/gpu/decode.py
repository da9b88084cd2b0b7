"""Decoding steps of one side, in process: kernels by name, the host's time in our code, memory.

The model has few layers: it starts soon, and what is added to a step stands out. It doesn't depend on the model's own layers,
but for ``all``, whose statistics are those of the few.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.engines import SIDES, opened, parameters, prompts
from benchmarks.gpu.launched import cost

# Where a step passes our code on the host.
_OF_A_STEP = ("begin_step", "after_forward", "transform", "with_records")
_MOST_STEPS = 2000  # until all requests decode


def measure(
    add: Callable[..., None],
    *,
    side: str,
    dry: bool,
    requests: int = 256,
    context: int = 1024,
    layers: int = 4,
    steps: int = 20,
) -> None:
    """Decode until all requests do, then measure steps.

    Args:
        add: writes a result.
        side: of ``SIDES``.
        dry: a tiny shape, on a CPU.
        requests: that decode at once.
        context: tokens of a prompt.
        layers: of the model.
        steps: that are measured, three times.
    """
    chosen = SIDES[side]
    device = torch.device("cpu" if dry else "cuda")
    tokens = 8 * steps + 40  # some are generated until the last request decodes
    start = time.monotonic()
    with opened(chosen, requests=[requests], positions=context + tokens, dry=dry, layers=layers, in_process=True) as llm:
        ready = round(time.monotonic() - start, 1)
        engine = llm.llm_engine
        for index, prompt in enumerate(prompts(requests, context)):
            engine.add_request(str(index), prompt, parameters(chosen, tokens))
        decoding = _until_all_decode(engine, requests)
        adapter = None
        if chosen.settings is not None:
            from tests.support.engine import adapter_of

            adapter = adapter_of(llm)
        for _ in range(3):
            engine.step()
        with _clocked(adapter) as clock:
            for _ in range(steps):
                engine.step()
        found = cost(engine.step, device, repeats=steps, warm_up=0)
        add(
            part="decode",
            side=side,
            requests=requests,
            decoding=decoding,
            context=context,
            layers=layers,
            ready_after=ready,
            host_ms=round(sum(clock.values()) / steps * 1e3, 4),
            host_ms_by_method={name: round(spent / steps * 1e3, 4) for name, spent in clock.items()},
            memory_mib=None if dry else _mib(torch.cuda.memory_allocated()),
            peak_memory_mib=None if dry else _mib(torch.cuda.max_memory_allocated()),
            **found.told(),
        )


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def _until_all_decode(engine: Any, requests: int) -> int:
    """Step until every request has a few tokens; how many have."""
    decoding: set[str] = set()
    for _ in range(_MOST_STEPS):
        decoding.update(output.request_id for output in engine.step() if len(output.outputs[0].token_ids) >= 3)
        if len(decoding) == requests:
            break
    return len(decoding)


@contextmanager
def _clocked(adapter: Any | None) -> Iterator[dict[str, float]]:
    """Seconds that the host spends in each of the adapter's methods."""
    spent: dict[str, float] = {}

    def clocked(name: str) -> Callable[..., Any]:
        original = getattr(adapter, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    names = () if adapter is None else _OF_A_STEP
    for name in names:
        spent[name] = 0.0
        setattr(adapter, name, clocked(name))
    try:
        yield spent
    finally:
        for name in names:
            delattr(adapter, name)
