"""Tokens per second of one side; run it for both, and compare figures of one run alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.engines import SIDES, opened, parameters, prompts

_WARM_UP = 8  # tokens


def measure(
    add: Callable[..., None],
    *,
    side: str,
    requests: Sequence[int],
    rounds: int,
    dry: bool,
    context: int = 1024,
    tokens: int = 128,
) -> None:
    """Generate with each number of requests, and write each round down.

    Args:
        add: writes a result.
        side: of ``SIDES``.
        requests: numbers of requests.
        rounds: with each of these.
        dry: a tiny shape, on a CPU.
        context: tokens of a prompt.
        tokens: that are generated for each.
    """
    chosen = SIDES[side]
    start = time.monotonic()
    with opened(chosen, requests=requests, positions=context + tokens + 16, dry=dry) as llm:
        ready = round(time.monotonic() - start, 1)
        for number in requests:
            given = prompts(number, context)

            def generate(count: int, given: Sequence[Any] = given) -> tuple[float, int]:
                begun = time.perf_counter()
                outputs = llm.generate(given, parameters(chosen, count), use_tqdm=False)
                return time.perf_counter() - begun, sum(len(output.outputs[0].token_ids) for output in outputs)

            generate(_WARM_UP if not dry else 2)
            for round_number in range(rounds):
                first, _ = generate(1)
                whole, generated = generate(tokens)
                add(
                    part="throughput",
                    side=side,
                    requests=number,
                    context=context,
                    tokens=tokens,
                    round=round_number,
                    ready_after=ready,
                    tokens_per_second=round(generated / whole, 1),
                    # What is added to decoding shows in the time of many tokens less that of one.
                    decode_ms=round((whole - first) / (tokens - 1) * 1e3, 4),
                )
