"""Turns benchmark results (benchmarks/results/*.json) into Markdown tables and a plot, so that no figure is copied by hand.

A document says where a table goes by the comments ``<!-- benchmark:NAME -->`` and ``<!-- /benchmark -->``, with NAME a result's
file name without ``.json``, or NAME#PART for a part of a run of ``benchmarks.gpu``, kept as NAME.jsonl; NAME,NAME#PART for what
several runs have found, of which the last counts. What stands between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_MARK = re.compile(r"(<!-- benchmark:([\w.,#-]+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def number(value: float | None) -> str:
    """Three digits, no exponent; a dash for what wasn't measured."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.5f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column left, the others right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sampler(results: list[dict[str, Any]]) -> str:
    """Step times of the sampler, or of chains."""
    if "chain" in results[0]:
        return chains(results)
    if "unfiltered" in results[0]:
        return unfiltered(results)
    head = ["rows, vocabulary", "vLLM, ms", "entropix, ms", "ratio", "metrics / one read", "extra memory / logits"]
    rows = [
        [
            f"{one['rows']}, {one['vocabulary']:,}",
            number(one["median_ms"]["vllm"]),
            number(one["median_ms"]["entropix"]),
            number(one["entropix_over_vllm"]),
            number(one.get("metrics_over_read")),
            number(one["peak_extra_over_logits"]),
        ]
        for one in results
    ]
    return markdown(head, rows)


def unfiltered(results: list[dict[str, Any]]) -> str:
    """Step times of rows that nothing filters."""
    head = ["rows, vocabulary", "vLLM, ms", "entropix, ms", "of which before the draw, ms", "before the draw / vLLM", "ratio"]
    rows = [
        [
            f"{one['rows']}, {one['vocabulary']:,}",
            *(number(one["median_ms"][name]) for name in ("vllm", "entropix", "transform")),
            number(one["transform_over_vllm"]),
            number(one["entropix_over_vllm"]),
        ]
        for one in results
    ]
    return markdown(head, rows)


def chains(results: list[dict[str, Any]]) -> str:
    """Step times of chains."""
    head = ["chain", "rows, vocabulary", "tokens before", "vLLM, ms", "chain, ms", "of which before the draw, ms", "ratio"]
    head.append("extra memory / logits")
    rows = [
        [
            f"`{one['chain']}`",
            f"{one['rows']}, {one['vocabulary']:,}",
            f"{one['text']:,}",
            *(number(one["median_ms"][name]) for name in ("vllm", "chain", "transform")),
            number(one["chain_over_vllm"]),
            number(one["peak_extra_over_logits"]),
        ]
        for one in results
    ]
    return markdown(head, rows)


def attention(results: list[dict[str, Any]]) -> str:
    """Times of the attention statistics."""
    if "copy" in results[0]["median_ms"]:
        head = ["rows, context, layers", "statistics, ms", "keys, GB/s", "share of a copy's bandwidth", "extra memory, MiB"]
        return markdown(
            head,
            [
                [
                    f"{one['rows']}, {one['context']:,}, {one['layers']}",
                    number(one["median_ms"]["statistics"]),
                    number(one["statistics_key_gb_per_second"]),
                    number(one["bandwidth_over_copy"]),
                    number(one["peak_extra_mib"]),
                ]
                for one in results
            ],
        )
    head = ["rows, context, layers", "vLLM's attention, ms", "statistics, ms", "ratio", "keys, GB/s"]
    return markdown(
        head,
        [
            [
                f"{one['rows']}, {one['context']:,}, {one['layers']}",
                number(one["median_ms"]["attention"]),
                number(one["median_ms"]["statistics"]),
                number(one["statistics_over_attention"]),
                number(one["statistics_key_gb_per_second"]),
            ]
            for one in results
        ],
    )


def throughput(results: list[dict[str, Any]]) -> str:
    """Tokens per second of a whole engine."""
    modes = [mode for mode in results[0]["tokens_per_second"] if mode != "vllm"]
    names = {"last": "last layer", "all": "all layers", "trace": "traced", "logits": "logits alone"}
    head = ["model, requests", "vLLM, tokens/s", *(f"{names[mode]}, over vLLM" for mode in modes)]
    return markdown(
        head,
        [
            [
                f"{one['model']}, {one['requests']}" + (", eager" if one["eager"] else ""),
                number(one["tokens_per_second"]["vllm"]),
                *(f"{one['over_vllm'][mode]:.3f}" for mode in modes),
            ]
            for one in results
        ],
    )


def answers(results: list[dict[str, Any]]) -> str:
    """How long a server answers nobody else."""
    head = ["asked for", "answer, MB", "answer, s", "longest wait for `/health`, s"]
    rows = [
        [
            f"{one['asked']}, {one['choices']} choices of {one['tokens']} tokens",
            *(number(one[key]) for key in ("megabytes", "seconds", "health_seconds")),
        ]
        for one in results
    ]
    return markdown(head, rows)


def host(results: list[dict[str, Any]]) -> str:
    """What a step's own Python takes of the host."""
    head = ["what", "ms", "operations of PyTorch", "launches"]
    rows = [[one["what"], number(one["ms"]["median"]), str(one["operations"]), str(one["launches"])] for one in results]
    return markdown(head, rows)


def forks(results: list[dict[str, Any]]) -> str:
    """What branches cost beside independent samples; the first mechanism is the default."""
    head = [
        "branches",
        "n samples, tokens/s",
        *(f"{name}, over n" for name in ("copy on write", "prefix cache")),
        "a branch's first token, ms",
        "by the prefix cache",
        "tokens computed again",
        "by the prefix cache",
    ]
    mechanisms = ("auto", "prefix-cache")
    return markdown(
        head,
        [
            [
                str(one["branches"]),
                number(one["tokens_per_second"]["n"]),
                *(f"{one['over_n'][name]:.3f}" for name in mechanisms),
                *(number(one["first_token_ms"].get(name)) for name in mechanisms),
                *(number(one["computed_again"].get(name)) for name in mechanisms),
            ]
            for one in results
        ],
    )


TABLES: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "sampler": sampler,
    "host": host,
    "attention": attention,
    "throughput": throughput,
    "answers": answers,
    "forks": forks,
}


def described(machine: dict[str, Any], command: str) -> str:
    """Where and how it was measured."""
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{device}; torch {machine['torch']}, vLLM {machine['vllm']}; {machine['date']}; `{command}`\n"


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """A result.

    Raises:
        ValueError: there is none of this name, or it has no table.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        raise ValueError(f"there is no {path}")
    result: dict[str, Any] = json.loads(path.read_text())
    if result.get("benchmark") not in TABLES or not result["results"]:
        raise ValueError(f"{name} has no results for a table")
    return result


def table(name: str, folder: Path = RESULTS) -> str:
    """A result's table, with a line that says where it was measured; errors as of :func:`load`."""
    runs, _, part = name.partition("#")
    if part:
        from benchmarks.gpu import tables

        return tables.part([folder / f"{run}.jsonl" for run in runs.split(",")], part)
    result = load(name, folder)
    return TABLES[result["benchmark"]](result["results"]) + "\n" + described(result["machine"], result["command"])


def filled(text: str, folder: Path = RESULTS) -> str:
    """A document with its tables replaced."""
    return _MARK.sub(lambda found: found[1] + table(found[2], folder) + found[3], text)


def plot(results: list[dict[str, Any]]) -> str:
    """SVG of the attention statistics' time over the context's length, both axes logarithmic."""
    import vl_convert

    names = {"attention": "vLLM's attention", "statistics": "entropix statistics", "copy": "copy of the keys' bytes"}
    points = [
        {"context": one["context"], "ms": ms, "what": f"{names[what]}, {one['rows']} row" + "s" * (one["rows"] > 1)}
        for one in results
        for what, ms in one["median_ms"].items()
    ]
    contexts = sorted({one["context"] for one in results})
    specification = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": 460,
        "height": 260,
        "background": "white",
        "data": {"values": points},
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {
                "field": "context",
                "type": "quantitative",
                "scale": {"type": "log", "base": 2},
                "axis": {"values": contexts, "format": ",d"},
                "title": "positions per row",
            },
            "y": {"field": "ms", "type": "quantitative", "scale": {"type": "log"}, "title": "milliseconds per layer and step"},
            "color": {"field": "what", "type": "nominal", "title": None},
        },
    }
    return str(vl_convert.vegalite_to_svg(json.dumps(specification)))


def main() -> None:
    """Parse, fill, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Fills documents with benchmark tables.")
    parser.add_argument("documents", type=Path, nargs="+", help="Markdown files to be filled")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document isn't up to date")
    parser.add_argument("--plot", type=Path, help="also write the attention statistics' plot (SVG) there")
    parser.add_argument("--plot-of", default="attention-cpu", help="the result to plot (default: %(default)s)")
    options = parser.parse_args()
    stale = []
    for document in options.documents:
        text = document.read_text()
        new = filled(text)
        if new != text:
            stale.append(str(document))
            if not options.check:
                document.write_text(new)
    if options.plot is not None and not options.check:
        options.plot.write_text(plot(load(options.plot_of)["results"]) + "\n")
    if options.check and stale:
        sys.exit(f"not up to date: {', '.join(stale)}")


if __name__ == "__main__":
    main()
