"""Memory of a process that generates many traced requests with ``LLM.generate``: its growth, results included, per request."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

from benchmarks.common import add_out, finish, quiet


def resident() -> int:
    """Resident memory of this process, bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="requests (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4, help="generated tokens per request (default: %(default)s)")
    add_out(parser)
    options = parser.parse_args()
    quiet()
    from vllm import LLM, SamplingParams

    from vllm_entropix.demo_model import shipped_model

    llm = LLM(
        str(shipped_model()),
        additional_config={"entropix": {}},
        max_model_len=256,
        max_num_seqs=256,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        disable_log_stats=True,
    )

    def generate(count: int, traced: bool) -> list[Any]:
        extra = {"entropix_trace": "on"} if traced else {}
        params = SamplingParams(max_tokens=options.tokens, ignore_eos=True, extra_args=extra)
        return list(llm.generate([f"What is in box {i}?" for i in range(count)], params))

    generate(256, traced=True)  # a warm-up: what is allocated once
    results = []
    for traced in (False, True):
        gc.collect()
        before = resident()
        outputs = generate(options.requests, traced)
        grown = resident() - before
        records = sum(len(output.outputs[0].entropix_trace) for output in outputs) if traced else 0
        results.append(
            {
                "requests": options.requests,
                "tokens": options.tokens,
                "traced": traced,
                "records": records,
                "grown_mib": round(grown / 2**20, 1),
                "bytes_per_request": round(grown / options.requests),
            }
        )
        del outputs
    finish("memory", results, options.out)


if __name__ == "__main__":
    main()
