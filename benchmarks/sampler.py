"""One entropix step, from logits to drawn tokens, over vLLM's own sampler with top_k and top_p on the same logits."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.common import add_out, finish, integers, medians_ms, paired, peak_extra_bytes, quiet, ratio

if TYPE_CHECKING:
    from vllm_entropix.rows.batch import BatchSampler


def vllm_metadata(rows: int, device: torch.device, top_k: int | None, top_p: float | None, temperature: float):
    """vLLM's description of a batch of sampled rows without penalties."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    return SamplingMetadata(
        temperature=torch.full((rows,), temperature, device=device),
        all_greedy=False,
        all_random=True,
        top_p=None if top_p is None else torch.full((rows,), top_p, device=device),
        top_k=None if top_k is None else torch.full((rows,), top_k, dtype=torch.int32, device=device),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.empty(0),
        presence_penalties=torch.empty(0),
        repetition_penalties=torch.empty(0),
        output_token_ids=[],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def flashinfer_sampler(logits: torch.Tensor, top_k: int, top_p: float, temperature: float) -> Callable[[], object] | None:
    """FlashInfer's filters and draw, where it is installed for this device."""
    if logits.device.type != "cuda" or importlib.util.find_spec("flashinfer") is None:
        return None
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    return lambda: top_k_top_p_sampling_from_logits(logits / temperature, top_k, top_p)


@dataclass(frozen=True)
class Step:
    """A sampler's step on some logits, ours and vLLM's.

    Attributes:
        prepare: puts the logits back that the actions change in place.
        actions: what is timed, each on prepared logits: whole steps, from logits to drawn tokens (``vllm``, ``entropix``,
            ``flashinfer`` where it is installed), ``transform``, which is ours without the draw, ``metrics`` and ``read``.
        batch: the batch sampler behind ours.
    """

    prepare: Callable[[], object]
    actions: dict[str, Callable[[], object]]
    batch: BatchSampler


def step(rows: int, vocabulary: int, device: torch.device) -> Step:
    """A step of this size, all of its rows drawn."""
    import numpy as np
    from vllm.v1.sample.sampler import Sampler

    from vllm_entropix import EntropixConfig
    from vllm_entropix.rows.batch import BatchSampler
    from vllm_entropix.rows.rows import Rows
    from vllm_entropix.rows.table import Sequence

    config = EntropixConfig()
    generator = torch.Generator().manual_seed(0)
    # Rows of every kind: flat to peaked, as a serving batch has them.
    logits = torch.randn(rows, vocabulary, generator=generator) * torch.linspace(0.5, 6.0, rows).unsqueeze(-1)
    logits = logits.to(device)
    work = torch.empty_like(logits)
    batch = BatchSampler(config, rows, None, device)
    numbers = [value for _, value in config.numbers()]
    for row in range(rows):
        batch.add(str(row), Sequence(numbers, sampled=True, traced=False, allow_clarification=True, prompt_length=1))
    batch.sequences.flush()
    slots = batch.sequences.slots_of(map(str, range(rows)), rows)
    described = Rows(
        slots=torch.from_numpy(slots).to(device),
        host_slots=np.asarray(slots),
        positions=torch.full((rows,), 10, device=device),
        input_ids=torch.zeros(rows, dtype=torch.int64, device=device),
        valid=torch.ones(rows, dtype=torch.bool, device=device),
        batch=torch.arange(rows, device=device),
    )
    sampler = Sampler()
    filtered = vllm_metadata(rows, device, config.base.top_k, config.base.top_p, config.base.temperature)
    neutral = vllm_metadata(rows, device, None, None, 1.0)

    def vllm() -> object:
        return sampler.sample(work, filtered)

    def entropix() -> object:
        batch.apply(work, described, None)
        return sampler.sample(work, neutral)

    def transform() -> object:
        return batch.apply(work, described, None)

    def metrics() -> object:
        return batch.backend.statistics(work)

    def read() -> object:
        return work.sum()

    actions = {"vllm": vllm, "entropix": entropix, "transform": transform, "metrics": metrics, "read": read}
    rival = flashinfer_sampler(work, config.base.top_k, config.base.top_p, config.base.temperature)
    if rival is not None:
        actions["flashinfer"] = rival
    return Step(lambda: work.copy_(logits), actions, batch)


def measure(rows: int, vocabulary: int, repeats: int, device: torch.device) -> dict[str, object]:
    """Times and memory at one size."""
    one = step(rows, vocabulary, device)
    times = paired(one.actions, repeats, one.prepare, device.type == "cuda")
    one.prepare()
    extra = peak_extra_bytes(one.actions["entropix"], device)
    rival = "flashinfer" in one.actions
    return {
        "rows": rows,
        "vocabulary": vocabulary,
        "median_ms": medians_ms(times),
        "entropix_over_vllm": round(ratio(times, "entropix", "vllm"), 4),
        **({"entropix_over_flashinfer": round(ratio(times, "entropix", "flashinfer"), 4)} if rival else {}),
        "metrics_over_read": round(ratio(times, "metrics", "read"), 4),
        "peak_extra_over_logits": round(extra / (4 * rows * vocabulary), 3),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler", description=__doc__)
    parser.add_argument("--rows", type=integers, default=[32], help="batch sizes, comma-separated (default: 32)")
    parser.add_argument("--vocab", type=integers, default=[128256], help="vocabulary sizes, comma-separated (default: 128256)")
    parser.add_argument("--repeats", type=int, default=20, help="paired rounds (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    options = parser.parse_args()
    quiet()
    import vllm.platforms

    vllm.platforms.current_platform.import_kernels()
    device = torch.device(options.device)
    results = []
    with torch.inference_mode():
        for vocabulary in options.vocab:
            for rows in options.rows:
                results.append(measure(rows, vocabulary, options.repeats, device))
    finish("sampler", results, options.out)


if __name__ == "__main__":
    main()
