"""Tokens per second of a real engine: entropix (last layer, all layers, traced) over vLLM with the same base parameters.

All engines are in one process. ``benchmarks.gpu`` measures engines that fill a GPU, in a process each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.common import add_out, finish, quiet


def build(model: str, config: dict[str, Any] | None, options: argparse.Namespace) -> Any:
    """An engine, with or without entropix."""
    import torch
    from vllm import LLM

    additional = {} if config is None else {"additional_config": {"entropix": config}}
    if options.kv_bytes or not torch.cuda.is_available():
        additional["kv_cache_memory_bytes"] = options.kv_bytes or 1 << 29
    else:
        additional["gpu_memory_utilization"] = 0.3
    return LLM(
        model,
        dtype=options.dtype,
        max_model_len=options.context + options.tokens,
        max_num_seqs=max(options.requests),
        enforce_eager=options.eager,
        load_format=options.load_format,
        skip_tokenizer_init=options.load_format == "dummy",
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **additional,
    )


def run(llm: Any, requests: int, options: argparse.Namespace, extra: dict[str, Any]) -> float:
    """Generated tokens per second of one batch."""
    from vllm import SamplingParams

    from vllm_entropix import EntropixConfig

    base = EntropixConfig().base
    params = [
        SamplingParams(
            max_tokens=options.tokens,
            ignore_eos=True,
            seed=None,
            temperature=base.temperature,
            top_p=base.top_p,
            top_k=base.top_k,
            min_p=base.min_p,
            extra_args=extra,
            detokenize=options.load_format != "dummy",
        )
        for _ in range(requests)
    ]
    prompts = [{"prompt_token_ids": [3 + (7 * i + j) % 200 for j in range(options.context)]} for i in range(requests)]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    return sum(len(output.outputs[0].token_ids) for output in outputs) / elapsed


def main() -> None:
    """Parse, measure, print."""
    from vllm_entropix.demo_model import shipped_model

    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--model", default=str(shipped_model()), help="model folder or name (default: the shipped one)")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, only the model's config.json is needed")
    parser.add_argument("--requests", type=lambda text: [int(n) for n in text.split(",")], default=[32])
    parser.add_argument("--tokens", type=int, default=128, help="generated tokens per request (default: 128)")
    parser.add_argument("--context", type=int, default=32, help="prompt tokens per request (default: 32)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true", help="without compilation and CUDA graphs")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default: 5)")
    parser.add_argument("--kv-bytes", type=int, help="key-value cache of each engine (default: 512 MiB on a CPU)")
    parser.add_argument("--modes", default="last,all,trace", help="of: last, all, trace, logits (default: %(default)s)")
    add_out(parser)
    options = parser.parse_args()
    quiet()
    # All engines stay open: a process can't open one after another has been closed halfway.
    engines: dict[str, tuple[Any, dict[str, Any]]] = {"vllm": (build(options.model, None, options), {})}
    last = None
    for mode in options.modes.split(","):
        if mode in ("last", "trace"):
            last = last or build(options.model, {"attention": {"layers": "last"}}, options)
            engines[mode] = (last, {"entropix_trace": "on"} if mode == "trace" else {})
        elif mode == "all":
            engines[mode] = (build(options.model, {"attention": {"layers": "all"}}, options), {})
        elif mode == "logits":
            engines[mode] = (build(options.model, {"attention": {"enabled": False}}, options), {})
        else:
            parser.error(f"unknown mode {mode}")
    results = []
    for requests in options.requests:
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for round_number in range(options.rounds + 1):
            for name, (llm, extra) in engines.items():
                speed = run(llm, requests, options, extra)
                if round_number:  # the first is a warm-up
                    speeds[name].append(speed)
        plain = speeds["vllm"]
        results.append(
            {
                "model": Path(options.model).name,
                "requests": requests,
                "tokens": options.tokens,
                "context": options.context,
                "eager": options.eager,
                "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
                "over_vllm": {
                    name: round(statistics.median(a / b for a, b in zip(values, plain, strict=True)), 4)
                    for name, values in speeds.items()
                    if name != "vllm"
                },
            }
        )
    finish("throughput", results, options.out)


if __name__ == "__main__":
    main()
