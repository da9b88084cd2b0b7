"""What a fork costs: time to a branch's first token, tokens computed again, and throughput beside independent samples (n).

Each request forks once, at its first token, and all branches run to their end; so k branches and n = k samples generate the
same number of tokens, but for those that the branches share.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.common import add_out, finish, integers, quiet

# Only the first token forks, into as many branches as are asked for.
ONCE = {"distance": 1_000_000, "floor": 0, "inside_words": True, "entropy": 0, "budget": 10_000_000, "engine_budget": 10**9}


def build(mechanism: str, options: argparse.Namespace) -> Any:
    """An engine whose branches share what is computed by this mechanism."""
    import torch
    from vllm import LLM

    config = {"forks": {**ONCE, "mechanism": mechanism}, "trace": {"alternatives": max(2, *options.branches)}}
    memory = {"gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 1 << 29}
    return LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=options.context + options.tokens + 1,
        max_num_seqs=options.requests * max(options.branches),
        enforce_eager=options.eager,
        disable_log_stats=True,
        seed=0,
        additional_config={"entropix": config},
        **memory,
    )


class Births:
    """When branches began, and when each had its first token of the engine.

    Args:
        processor: vLLM's OutputProcessor, whose requests fork.
    """

    def __init__(self, processor: Any) -> None:
        self._began: dict[str, float] = {}
        self.seconds: list[float] = []
        self.again: list[int] = []
        add, process = processor.add_branch, processor.process_outputs

        def add_branch(request: Any, prompt: Any, sequence: Any) -> Any:
            if sequence.number:
                self._began[request.request_id] = time.perf_counter()
            return add(request, prompt, sequence)

        def process_outputs(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            now = time.perf_counter()
            for output in outputs:
                began = self._began.pop(output.request_id, None)
                if began is not None:
                    self.seconds.append(now - began)
                    stats = output.prefill_stats
                    # All but the last token of its prompt could have been found.
                    self.again.append(stats.num_prompt_tokens - 1 - stats.num_cached_tokens)
            return process(outputs, *args, **kwargs)

        processor.add_branch, processor.process_outputs = add_branch, process_outputs

    def take(self) -> tuple[list[float], list[int]]:
        """What was noted since the last call: seconds to the first token, and tokens computed again."""
        taken = self.seconds, self.again
        self.seconds, self.again = [], []
        return taken


def run(llm: Any, branches: int, forked: bool, options: argparse.Namespace, salt: int) -> float:
    """Generated tokens per second of a batch of requests that fork, or of as many independent samples.

    What branches share counts once. ``salt``: other prompts than another's, so that nothing of them is in the cache.
    """
    from vllm import SamplingParams

    asked = {"entropix_forks": branches, "entropix_fork_width": branches} if forked and branches > 1 else None
    samples = 1 if forked else branches
    params = [
        SamplingParams(max_tokens=options.tokens, ignore_eos=True, seed=number, n=samples, extra_args=asked)
        for number in range(options.requests)
    ]
    prompts = [
        {"prompt_token_ids": [3 + (7 * number + 11 * salt + place * (1 + salt % 5)) % 200 for place in range(options.context)]}
        for number in range(options.requests)
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    generated = 0
    for output in outputs:
        tree = getattr(output.outputs[0], "entropix_forks", None)
        assert tree is None or len(tree.branches) == branches, "a request didn't fork as it should"
        generated += sum(len(one.token_ids) for one in output.outputs) if tree is None else tree.generated
    return generated / elapsed


def main() -> None:
    """Parse, measure, print."""
    from vllm_entropix.demo_model import shipped_model

    parser = argparse.ArgumentParser(prog="python -m benchmarks.forks", description=__doc__)
    parser.add_argument("--model", default=str(shipped_model()), help="model folder or name (default: the shipped one)")
    parser.add_argument("--branches", type=integers, default=[1, 2, 4, 8], help="of each request (default: 1,2,4,8)")
    parser.add_argument("--requests", type=int, default=4, help="at once (default: 4)")
    parser.add_argument("--tokens", type=int, default=128, help="generated tokens per branch (default: 128)")
    parser.add_argument("--context", type=int, default=250, help="prompt tokens per request (default: 250)")
    parser.add_argument("--mechanisms", default="auto,prefix-cache", help="how branches share (default: %(default)s)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true", help="without compilation and CUDA graphs")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default: 5)")
    add_out(parser)
    options = parser.parse_args()
    quiet()
    # All engines stay open: a process can't open one after another has been closed halfway.
    engines = {mechanism: build(mechanism, options) for mechanism in options.mechanisms.split(",")}
    births = {mechanism: Births(llm.llm_engine.output_processor) for mechanism, llm in engines.items()}
    results, salt = [], 0
    for branches in options.branches:
        speeds: dict[str, list[float]] = {name: [] for name in ("n", *engines)}
        first: dict[str, list[float]] = {name: [] for name in engines}
        again: dict[str, list[int]] = {name: [] for name in engines}
        plain = next(iter(engines.values()))
        for round_number in range(options.rounds + 1):
            for name in speeds:
                salt += 1
                speed = run(engines.get(name, plain), branches, name != "n", options, salt)
                found = births[name].take() if name in births else ([], [])
                if round_number:  # the first is a warm-up
                    speeds[name].append(speed)
                    if name in births:
                        first[name] += found[0]
                        again[name] += found[1]
        results.append(
            {
                "model": Path(options.model).name,
                "branches": branches,
                "requests": options.requests,
                "tokens": options.tokens,
                "context": options.context,
                "eager": options.eager,
                "tokens_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
                "over_n": {
                    name: round(statistics.median(a / b for a, b in zip(speeds[name], speeds["n"], strict=True)), 4)
                    for name in engines
                },
                "first_token_ms": {name: round(statistics.median(of) * 1e3, 2) for name, of in first.items() if of},
                "computed_again": {name: round(statistics.mean(of), 2) for name, of in again.items() if of},
            }
        )
    finish("forks", results, options.out)


if __name__ == "__main__":
    main()
