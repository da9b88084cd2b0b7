"""How long a server answers nobody while it makes one large answer: plain, with logprobs, and traced.

A server with entropix is asked for all three in turn; meanwhile `/health` is asked again and again, each time when the last has
answered, and the longest answer counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import add_out, finish

# By name: what a request asks for beside its tokens.
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "logprobs": {"logprobs": 5},
    "traced": {"vllm_xargs": {"entropix_trace": "on"}},
    "traced, streamed": {"vllm_xargs": {"entropix_trace": "on"}, "stream": True},
}


@contextlib.contextmanager
def server(model: str, length: int) -> Iterator[str]:
    """The address of a server with entropix on one port of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = ["--host", "127.0.0.1", "--port", str(port), "--sampler", "entropix", "--enforce-eager", "--dtype", "float32"]
    size = ["--max-model-len", str(length), "--kv-cache-memory-bytes", str(2 << 30), "--max-num-seqs", "64"]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--served-model-name", "model", *options, *size]
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server ended: {log.read().decode(errors='replace')[-2000:]}")
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=2).close()
                    break
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def longest_silence(url: str, body: dict[str, Any]) -> dict[str, float]:
    """Seconds that an answer took, its megabytes, and the longest that `/health` took meanwhile, in seconds."""
    ended, waits = threading.Event(), [0.0]

    def watch() -> None:
        while not ended.is_set():
            start = time.perf_counter()
            urllib.request.urlopen(f"{url}/health", timeout=120).close()
            waits.append(time.perf_counter() - start)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        with urllib.request.urlopen(request, timeout=1200) as answer:
            size = sum(len(part) for part in iter(lambda: answer.read(1 << 20), b""))
        seconds = time.perf_counter() - start
    finally:
        ended.set()
        watcher.join()
    return {"seconds": round(seconds, 3), "megabytes": round(size / 1e6, 2), "health_seconds": round(max(waits), 3)}


def main() -> None:
    """Ask for all of them in turn, some rounds, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: the shipped model")
    parser.add_argument("--choices", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--asked", default=",".join(ASKED), help="which of them, separated by commas without blanks")
    add_out(parser)
    options = parser.parse_args()
    if options.model is None:
        from vllm_entropix.demo_model import shipped_model

        options.model = str(shipped_model())
    common = {
        "model": "model",
        "prompt": "Once upon a time",
        "n": options.choices,
        "max_tokens": options.tokens,
        "ignore_eos": True,
        "seed": 1,
    }
    asked = {name: ASKED[name] for name in ASKED if name in options.asked}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    with server(options.model, options.tokens + 64) as url:
        longest_silence(url, {**common, "n": 1, "max_tokens": 8})
        for _ in range(options.repeats):
            for name, wanted in asked.items():
                rounds[name].append(longest_silence(url, {**common, **wanted}))
    results = [
        {
            "asked": name,
            "choices": options.choices,
            "tokens": options.tokens,
            **{key: statistics.median(one[key] for one in found) for key in found[0]},
            "health_seconds_of_rounds": [one["health_seconds"] for one in found],
        }
        for name, found in rounds.items()
    ]
    finish("answers", results, options.out)


if __name__ == "__main__":
    main()
