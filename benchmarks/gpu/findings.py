"""What a run has found, and what of it is held to a bar."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

# What the bytes allow over vLLM, by requests, if every row's keys of all layers are read once more (docs/performance.md).
ALL_LAYERS_ALLOWED = {64: 0.85, 256: 0.74}

Rate = Literal["tokens_per_second", "decode_ms"]


@dataclass(frozen=True)
class Findings:
    """Lines of results, and questions that several tables ask.

    Attributes:
        lines: as ``Results.lines`` gives them.
    """

    lines: list[dict[str, Any]]

    def of_part(self, part: str, **size: Any) -> list[dict[str, Any]]:
        """Measured lines of a part, of this size."""
        wanted = {"part": part, **size}.items()
        measured = (one for one in self.lines if "error" not in one and "skipped" not in one)
        return [one for one in measured if all(one.get(name) == value for name, value in wanted)]

    def value(self, name: str, part: str, **size: Any) -> float | None:
        """A number of the last line of this size; None if there is none."""
        found = [one[name] for one in self.of_part(part, **size) if one.get(name) is not None]
        return found[-1] if found else None

    def last(self, name: str) -> Any:
        """The last value of this name; None if no line has it."""
        return next((one[name] for one in reversed(self.lines) if name in one), None)

    def rate(self, side: str, requests: int, what: Rate = "tokens_per_second") -> float | None:
        """Median over a side's rounds; None if it wasn't measured."""
        rounds = [one[what] for one in self.of_part("throughput", side=side, requests=requests)]
        return statistics.median(rounds) if rounds else None

    def over_vllm(self, side: str, requests: int, what: Rate = "tokens_per_second") -> float | None:
        """How fast a side is, over vLLM alone; None if one of them wasn't measured."""
        ours, theirs = self.rate(side, requests, what), self.rate("vllm", requests, what)
        if not ours or not theirs:
            return None
        return ours / theirs if what == "tokens_per_second" else theirs / ours

    def ended(self) -> Iterator[dict[str, Any]]:
        """The line of each process or step that ended, or that wasn't begun."""
        return (one for one in self.lines if "status" in one)

    def problems(self) -> Iterator[str]:
        """What went wrong, each in a line."""
        for one in self.lines:
            if "error" in one:
                size = ", ".join(f"{name} {one[name]}" for name in ("part", "rows", "context", "layers") if name in one)
                yield f"{one['job']}{f' ({size})' if size else ''}: {one['error']}"
            for test in one.get("failed", ()):
                yield f"{one['job']}, {test['test']}: {test['said']}"
            if one.get("status") not in (None, 0):
                yield f"{one['job']}: {one.get('why') or one['status']}"


@dataclass(frozen=True)
class Bar:
    """A target on one H100-class GPU.

    Attributes:
        what: is held to it.
        bar: that it must reach.
        moonshot: what would be splendid.
        at_most: must the number be small?
        found: the number; None if it wasn't measured.
    """

    what: str
    bar: float
    moonshot: float
    at_most: bool
    found: Callable[[Findings], float | None]

    def verdict(self, value: float | None) -> str:
        """Whether a number reaches the bar, in a word."""
        if value is None:
            return "not measured"

        def reaches(bar: float) -> bool:
            return value <= bar if self.at_most else value >= bar

        return "moonshot" if reaches(self.moonshot) else "met" if reaches(self.bar) else "missed"


def _of_all_layers(requests: int) -> Callable[[Findings], float | None]:
    def found(findings: Findings) -> float | None:
        over = findings.over_vllm("all", requests)
        return None if over is None else over / ALL_LAYERS_ALLOWED[requests]

    return found


def _of_rates() -> Iterable[Bar]:
    for side, name, bar, moonshot in (("last", "last layer", 0.985, 0.995), ("trace", "traced", 0.975, 0.99)):
        for requests in (64, 256):
            what = f"8B shape, {requests} requests, context 1024, {name}: tokens per second over vLLM"
            yield Bar(what, bar, moonshot, False, partial(Findings.over_vllm, side=side, requests=requests))
    for requests in ALL_LAYERS_ALLOWED:
        what = f"8B shape, {requests} requests, context 1024, all layers: share of what the keys' bytes allow"
        yield Bar(what, 0.93, 0.98, False, _of_all_layers(requests))


BARS: tuple[Bar, ...] = (
    Bar(
        "sampler step, 256 rows, vocabulary 128256: over vLLM's own with top_k and top_p",
        0.7,
        0.4,
        True,
        lambda one: one.value("entropix_over_vllm", "sampler", rows=256, vocabulary=128_256),
    ),
    Bar(
        "llama.cpp's default chain with dry and xtc, 256 rows, vocabulary 128256: over vLLM's own step with top_k and top_p",
        1.0,
        0.7,
        True,
        lambda one: one.value("chain_over_vllm", "chain", rows=256, vocabulary=128_256),
    ),
    Bar(
        "metrics, 256 rows, vocabulary 128256: over one read of the logits",
        1.3,
        1.1,
        True,
        lambda one: one.value("metrics_over_read", "sampler", rows=256, vocabulary=128_256),
    ),
    *(
        Bar(
            f"attention statistics, {rows} rows, context {context}, one layer: share of a copy's bandwidth",
            0.7,
            0.85,
            False,
            partial(Findings.value, name="bandwidth_over_copy", part="attention", rows=rows, context=context, layers=1),
        )
        for rows, context in ((64, 8192), (256, 1024))
    ),
    *_of_rates(),
    Bar(
        "host time that a step adds at 256 requests, ms",
        0.3,
        0.1,
        True,
        lambda one: one.value("host_ms", "decode", side="last", requests=256),
    ),
)
