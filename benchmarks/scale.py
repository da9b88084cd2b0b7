"""What entropix costs beyond one GPU: bytes and time of a step's exchanges against ranks, rows, context and layers; fleets.

The unit costs of this machine's exchanges are measured here, between processes over gloo; those of another machine's are given
(``--latency-us``, ``--gigabytes-per-second``). The sizes are those of the tensors that ``attention/ranks.py`` exchanges. A
simulation of a server's steps, rows of mixed lengths and regimes, then gives what closed formulas don't: the spread.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common import add_out, finish, integers
from vllm_entropix.attention.ranks import WORTH_WAITING
from vllm_entropix.kernels.triton_.attention.workspace import EXCHANGE, exchanged_together

FLOAT = 4
# float32 a row in a message between pipeline stages: position and four sums.
STAGE_VALUES = 5
# float32 a row and layer in the second exchange, beside the heads' entropies: means of scores and of deviations.
SHARE_VALUES = 2


@dataclass(frozen=True)
class Link:
    """An exchange of n bytes a rank takes ``latency + n · (ranks - 1) / bandwidth`` seconds.

    Attributes:
        latency: seconds.
        bandwidth: bytes a second that a rank receives.
    """

    latency: float
    bandwidth: float

    def seconds(self, received: float) -> float:
        """Time of one exchange in which a rank receives so many bytes."""
        return self.latency + received / self.bandwidth

    def described(self) -> dict[str, float]:
        """For the results."""
        return {"latency_us": round(self.latency * 1e6, 1), "gb_per_second": round(self.bandwidth / 1e9, 3)}


@dataclass(frozen=True)
class Step:
    """What one rank exchanges in a step.

    Attributes:
        exchanges: among tensor-parallel ranks.
        received: bytes that a rank receives in them.
        stage_bytes: bytes of a message between pipeline stages.
    """

    exchanges: int
    received: int
    stage_bytes: int

    @classmethod
    def of(cls, contexts: np.ndarray, measured: np.ndarray, heads: int, layers: int, tensor: int, stages: int) -> Step:
        """For rows with these contexts, some of which read attention, as ``attention/ranks.py`` exchanges on a GPU.

        The sums of the weights over this rank's heads, of all rows or, where that is much, of the measured; then an entropy per
        head and two more values of each layer and row.
        """
        exchanges = received = 0
        if tensor > 1:
            rows, share, total, longest = len(contexts), heads // tensor, int(contexts.sum()), int(contexts.max())
            if layers * total > WORTH_WAITING:
                total = int(contexts[measured].sum())
            layers_at_once, rows_at_once = exchanged_together(layers, rows, share, total, longest, tensor, EXCHANGE)
            exchanges = -(-layers // layers_at_once) * -(-rows // rows_at_once) + 1
            received = layers * (total + rows * (1 + share + SHARE_VALUES)) * (tensor - 1) * FLOAT
        sent_on = int(measured.sum()) * STAGE_VALUES * FLOAT
        return cls(exchanges, received, sent_on if stages > 1 else 0)

    def seconds(self, link: Link) -> float:
        """Time of all the step's exchanges."""
        stage = link.seconds(self.stage_bytes) if self.stage_bytes else 0.0
        return stage + (self.exchanges * link.latency + self.received / link.bandwidth if self.exchanges else 0.0)


def _gather_times(rank: int, store: str, sizes: list[int], repeats: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for size in sizes:
        share = torch.zeros(size // FLOAT)
        whole = [torch.empty_like(share) for _ in range(2)]
        times = []
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            dist.all_gather(whole, share)
            times.append(time.perf_counter() - start)
        if rank == 0:
            results[size] = float(np.median(times))
    dist.destroy_process_group()


def measure_link(repeats: int) -> tuple[Link, dict[int, float]]:
    """All-gathers of several sizes between two processes of this machine: the line through their medians."""
    import tempfile

    sizes = [64, 4096, 1 << 16, 1 << 20, 1 << 22]
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        mp.start_processes(_gather_times, (f"{folder}/store", sizes, repeats, results), nprocs=2, start_method="spawn")
        found = dict(results)
    latency = found[sizes[0]]
    return Link(latency, (sizes[-1] - sizes[0]) / max(found[sizes[-1]] - latency, 1e-9)), found


def simulate(options: argparse.Namespace, link: Link, tensor: int, layers: int, rows: int) -> dict[str, Any]:
    """Steps of a server whose rows have lengths spread around a mean; each row asks for attention by chance."""
    draw = np.random.default_rng(0)
    sigma = 0.8
    times, received, exchanges = [], [], []
    for _ in range(options.steps):
        contexts = draw.lognormal(np.log(options.context) - sigma**2 / 2, sigma, rows).astype(int).clip(1, options.longest)
        measured = draw.random(rows) < options.measured
        step = Step.of(contexts, measured, options.heads, layers, tensor, 1)
        times.append(step.seconds(link))
        received.append(step.received)
        exchanges.append(step.exchanges)
    spread = np.quantile(times, [0.5, 0.95])
    return {
        "tensor_parallel": tensor,
        "layers": layers,
        "rows": rows,
        "median_exchanges": int(np.median(exchanges)),
        "median_megabytes": round(float(np.median(received)) / 1e6, 4),
        "median_ms": round(spread[0] * 1e3, 4),
        "p95_ms": round(spread[1] * 1e3, 4),
        "share_of_step": round(spread[0] / (options.step_ms / 1e3), 4),
    }


def fleet(options: argparse.Namespace) -> dict[str, Any]:
    """Metrics and traces of many replicas, from what one replica exports and one token's trace takes."""
    from prometheus_client import REGISTRY, generate_latest

    from vllm_entropix.observability import prometheus
    from vllm_entropix.records.schema import TokenEntry
    from vllm_entropix.records.trace import TokenRecord

    prometheus._counting()
    ours = [family for family in REGISTRY.collect() if family.name.startswith("entropix_")]
    # Labels that appear with use: five regimes; presets as many as the server is asked for.
    series = sum(len(family.samples) for family in ours) + 5 + options.presets
    scrape = len(b"".join(line + b"\n" for line in generate_latest().splitlines() if b"entropix_" in line))
    tokens = options.tokens_per_second * options.replicas
    record = TokenRecord(**EXAMPLE)
    line = len(TokenEntry.from_record(12345, record).model_dump_json()) + len('"text",12345,')
    return {
        "replicas": options.replicas,
        "series_per_replica": series,
        "series": series * options.replicas,
        "samples_per_second": round(series * options.replicas / options.scrape_seconds),
        "scrape_bytes": scrape,
        "metrics_megabits_per_second": round(scrape * 8 * options.replicas / options.scrape_seconds / 1e6, 2),
        "trace_bytes_per_token": line,
        "trace_gigabytes_per_day": round(line * tokens * 86400 / 1e9),
        "trace_gigabytes_per_day_of_one_in_a_hundred": round(line * tokens * 864 / 1e9),
    }


# A record as they are: figures with the digits of a float32.
EXAMPLE: dict[str, Any] = {
    "regime": "ADAPTIVE",
    "entropy": 1.2345678806304932,
    "varentropy": 2.3456788063049316,
    "attention_entropy": 4.567888063049316,
    "attention_varentropy": 0.5678880630493164,
    "agreement": 0.001234567880630493,
    "interaction_strength": 3.456788063049316,
    "logprob": -1.3456788063049316,
    "margin": 0.2345678806304932,
    "temperature": 0.7345678806304932,
    "top_p": 0.9345678806304932,
    "top_k": 27,
    "min_p": 0.03456788063049316,
    "confidence": 0.5678880630493164,
    "forced": False,
    "alternatives": [(12345 + i, 0.1234567880630493) for i in range(5)],
}


def main() -> None:
    """Measure, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=integers, default=[1, 2, 4, 8], help="tensor-parallel ranks")
    parser.add_argument("--rows", type=integers, default=[8, 64, 256])
    parser.add_argument("--layers", type=integers, default=[1, 32, 80], help="observed layers: 1 is `last`")
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--context", type=int, default=2048, help="mean")
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--measured", type=float, default=0.3, help="share of rows that read attention or are traced")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the model, to compare with")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--latency-us", type=float, help="of an exchange on another machine")
    parser.add_argument("--gigabytes-per-second", type=float, help="that a rank receives on another machine")
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--presets", type=int, default=3, help="that clients ask for")
    parser.add_argument("--tokens-per-second", type=float, default=2000.0, help="of a replica")
    parser.add_argument("--scrape-seconds", type=float, default=15.0)
    add_out(parser)
    options = parser.parse_args()
    measured, times = measure_link(options.repeats)
    link = measured
    if options.latency_us is not None and options.gigabytes_per_second is not None:
        link = Link(options.latency_us * 1e-6, options.gigabytes_per_second * 1e9)
    elif options.latency_us is not None or options.gigabytes_per_second is not None:
        parser.error("--latency-us and --gigabytes-per-second belong together")
    finish(
        "scale",
        {
            "measured_ms_of_bytes": {str(size): round(seconds * 1e3, 4) for size, seconds in times.items()},
            "measured_link": measured.described(),
            "link": link.described(),
            "pipeline_bytes_per_row": STAGE_VALUES * FLOAT,
            "steps": [
                simulate(options, link, tensor, layers, rows)
                for tensor in options.tensor
                for layers in options.layers
                for rows in options.rows
                if tensor > 1
            ],
            "fleet": fleet(options),
        },
        options.out,
    )


if __name__ == "__main__":
    main()
