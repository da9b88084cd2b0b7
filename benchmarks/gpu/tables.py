"""What a run has found, as Markdown: its summary, and tables for a document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import BARS, Findings
from benchmarks.gpu.results import Results
from benchmarks.tables import described, markdown, number

_SAID = 300


def _cost(cost: dict[str, Any] | None) -> str:
    if cost is None:
        return "-"
    return f"{number(cost['gpu_ms'])}, {cost['kernels']:.0f}, {number(cost['wall_ms'])}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def bars(found: Findings) -> str:
    """Targets, what was found, and whether that reaches them."""
    rows = []
    for bar in BARS:
        value = bar.found(found)
        sign = "≤" if bar.at_most else "≥"
        rows.append([bar.what, f"{sign} {bar.bar}", f"{sign} {bar.moonshot}", _ratio(value), bar.verdict(value)])
    return markdown(["target on one H100-class GPU", "bar", "moonshot", "measured", "verdict"], rows)


def modes(found: Findings) -> str:
    """Engines beside transformers: quantiles of the worst metric's relative errors, when a mode was last tried."""
    rows = {}
    for told in (test for one in found.lines for test in one.get("told", ())):
        if "errors" in told:
            quantiles = json.loads(told["errors"]).values()
            worst = [f"{max(values):.2g}" for values in zip(*quantiles, strict=True)]
            waits = json.loads(told.get("waits", "null"))
            mode = told["test"].partition("[")[2].removesuffix("]")
            rows[mode] = [
                mode,
                told.get("graphs", "-"),
                told.get("rows", "-"),
                *worst,
                "-" if waits is None else str(len(waits)),
            ]
    return markdown(["mode", "graphs", "rows", "error, median", "97 %", "largest", "places that wait"], list(rows.values()))


def sampler(found: Findings) -> str:
    """The sampler's step: GPU time, launches and time with launches, by what is done."""
    return _steps(found, "sampler", "entropix")


def chain(found: Findings) -> str:
    """The same of llama.cpp's default chain."""
    return _steps(found, "chain", "chain")


def _steps(found: Findings, part: str, ours: str) -> str:
    rows = [
        [
            f"{one['rows']}, {one['vocabulary']:,}",
            *(_cost(one["costs"].get(name)) for name in ("read", "metrics", "transform", ours, "vllm", "flashinfer")),
            _ratio(one[f"{ours}_over_vllm"]),
        ]
        for one in found.of_part(part)
    ]
    head = ["rows, vocabulary", "one read", "metrics", "without the draw", ours, "vLLM", "FlashInfer", f"{ours} / vLLM"]
    return markdown(head, rows) + "\nGPU ms, kernels, ms with launches.\n"


def attention(found: Findings) -> str:
    """Attention statistics: GPU time, launches, and the share of a copy's bandwidth."""
    rows = [
        [
            f"{one['rows']}, {one['context']:,}, {one['layers']}",
            _cost(one["costs"]["statistics"]),
            number(one["keys_gb_per_second"]),
            _ratio(one["bandwidth_over_copy"]),
            f"{one['rows_together']}",
            number(one["workspace_mib"]),
        ]
        for one in found.of_part("attention")
    ]
    head = [
        "rows, context, layers",
        "statistics",
        "keys, GB/s",
        "share of a copy's bandwidth",
        "rows a launch",
        "workspace, MiB",
    ]
    return markdown(head, rows) + "\nGPU ms, kernels, ms with launches.\n"


def decode(found: Findings) -> str:
    """Decoding steps: kernels, times, and memory over vLLM alone."""
    steps = found.of_part("decode")
    alone = next((one["memory_mib"] for one in steps if one["side"] == "vllm"), None)
    rows = []
    for one in steps:
        more = None if alone is None or one["memory_mib"] is None else one["memory_mib"] - alone
        times = (number(one[name]) for name in ("gpu_ms", "wall_ms", "host_ms"))
        size = f"{one['side']}, {one['requests']}, {one['context']:,}, {one['layers']}"
        rows.append([size, *times, f"{one['kernels']:.0f}", number(more)])
    head = ["side, requests, context, layers", "GPU ms", "step, ms", "host ms in entropix", "kernels", "memory over vLLM, MiB"]
    return markdown(head, rows)


def throughput(found: Findings) -> str:
    """Tokens per second of whole engines, medians over rounds, and their ratios to vLLM alone."""
    sizes = {(one["side"], one["requests"], one["context"]): None for one in found.of_part("throughput")}
    rows = [
        [
            f"{side}, {requests}, {context:,}",
            number(found.rate(side, requests)),
            number(found.rate(side, requests, "decode_ms")),
            *(_ratio(found.over_vllm(side, requests, what)) for what in ("tokens_per_second", "decode_ms")),
        ]
        for side, requests, context in sizes
    ]
    return markdown(
        ["side, requests, context", "tokens/s", "decoding step, ms", "over vLLM", "over vLLM, decoding alone"], rows
    )


PARTS: dict[str, Callable[[Findings], str]] = {
    "bars": bars,
    "modes": modes,
    "sampler": sampler,
    "chain": chain,
    "attention": attention,
    "decode": decode,
    "throughput": throughput,
}


def part(files: Sequence[Path], name: str) -> str:
    """A part of one or several runs' results as a table, with a line that says where they were measured.

    Raises:
        ValueError: there is no such part, or no line that describes the machine.
    """
    found = Findings([line for file in files for line in Results(file).lines()])
    machine = found.last("machine")
    if name not in PARTS or machine is None:
        raise ValueError(f"{','.join(file.name for file in files)}#{name} has no results for a table")
    commands = (one["command"] for one in found.lines if "command" in one)
    return PARTS[name](found) + "\n" + described(machine, "`, `".join(commands))


def summary(lines: list[dict[str, Any]]) -> str:
    """All of a run: what failed first, then what was measured."""
    found = Findings(lines)
    written = ["# GPU run", ""]
    if (machine := found.last("machine")) is not None:
        written += [described(machine, found.last("command")).strip(), ""]
    if card := found.last("card"):
        written += [", ".join(f"{name} {value}" for name, value in card.items()), ""]
    if bandwidth := found.last("bandwidth"):
        written += [", ".join(f"{name} {value} TB/s" for name, value in bandwidth.items()), ""]
    ended = [[one["job"], str(one["status"]), f"{one['seconds']:.0f}"] for one in found.ended()]
    written += ["## Processes", "", markdown(["process", "status", "seconds"], ended)]
    problems = [f"- {said[:_SAID]}" for said in (" ".join(one.split()) for one in found.problems())]
    written += ["## Problems", "", *(problems or ["None."]), ""]
    for name, table in PARTS.items():
        written += [f"## {name.capitalize()}", "", table(found)]
    return "\n".join(written)


if __name__ == "__main__":  # python -m benchmarks.gpu.tables RESULTS.jsonl
    print(summary(Results(Path(sys.argv[1])).lines()))
