"""A step of entropix or of a chain, from logits to drawn tokens, over vLLM's own with top_k and top_p on the same logits."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import add_out, finish, integers, medians_ms, paired, peak_extra_bytes, quiet, ratio

if TYPE_CHECKING:
    from vllm_entropix import EntropixConfig
    from vllm_entropix.rows.batch import BatchSampler
    from vllm_entropix.rows.table import Sequence
    from vllm_entropix.rows.text import RowText


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


@dataclass(frozen=True)
class Own:
    """vLLM's own work on a step's logits.

    Attributes:
        copied: what it does before logits processors: the logits that these are given.
        filtered: drawn tokens, by temperature, top_k and top_p.
        drawn: drawn tokens, where a processor has left nothing else to do.
    """

    copied: Callable[[torch.Tensor], torch.Tensor]
    filtered: Callable[[torch.Tensor], torch.Tensor]
    drawn: Callable[[torch.Tensor], torch.Tensor]


def own_of_v1(rows: int, device: torch.device, top_k: int | None, top_p: float | None, temperature: float) -> Own:
    """Model Runner V1's, which a CPU runs."""
    from vllm.v1.sample.sampler import Sampler

    sampler = Sampler()
    filtered = vllm_metadata(rows, device, top_k, top_p, temperature)
    neutral = vllm_metadata(rows, device, None, None, 1.0)
    return Own(
        lambda logits: logits,
        lambda logits: sampler.sample(logits, filtered)[0],
        lambda logits: sampler.sample(logits, neutral)[0],
    )


def own_of_v2(rows: int, device: torch.device, top_k: int | None, top_p: float | None, temperature: float) -> Own:
    """Model Runner V2's, which a GPU runs (vllm/v1/worker/gpu/sample/sampler.py), without FlashInfer."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature, gumbel_sample

    mapping = torch.arange(rows, dtype=torch.int32, device=device)
    temperatures = torch.full((rows,), temperature, device=device)
    seeds = torch.arange(rows, dtype=torch.int64, device=device)
    k = None if top_k is None else torch.full((rows,), top_k, dtype=torch.int32, device=device)
    p = None if top_p is None else torch.full((rows,), top_p, device=device)

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        return gumbel_sample(logits, mapping, temperatures, seeds, seeds, apply_temperature=False, is_drafting=False)

    def filtered(logits: torch.Tensor) -> torch.Tensor:
        apply_temperature(logits, mapping, temperatures)
        return drawn(apply_top_k_top_p(logits, k, p))

    return Own(lambda logits: torch.empty_like(logits).copy_(logits), filtered, drawn)


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
        actions: what is timed, each on prepared logits: whole steps, from logits to drawn tokens (``vllm``, ``entropix`` or
            ``chain``, by the runner that the device has; ``flashinfer`` where it is installed), ``transform``, which is ours
            without the draw, ``draw``, which is vLLM's alone, ``metrics`` and ``read``.
        batch: the batch sampler behind ours.
    """

    prepare: Callable[[], object]
    actions: dict[str, Callable[[], object]]
    batch: BatchSampler


@dataclass(frozen=True)
class Asked:
    """The chain that each request has.

    Attributes:
        chain: names with ``;`` between them.
        settings: of its samplers, as ``vllm_xargs`` have them.
        base: temperature, top_p, top_k and min_p of the request.
        text: tokens before each row, for DRY and penalties.
    """

    chain: str
    settings: dict[str, Any]
    base: Mapping[str, float]
    text: int


def sequence_of(batch: BatchSampler, config: EntropixConfig, asked: Asked | None) -> Sequence:
    """What the engine's adapter makes of a request."""
    from vllm_entropix.rows.table import BASE, Sequence
    from vllm_entropix.samplers import registry

    if asked is None:
        numbers = [value for _, value in config.numbers()]
        return Sequence(numbers, sampled=True, traced=False, allow_clarification=True, prompt_length=1)
    request = registry.parse_request({"samplers": asked.chain, **asked.settings}, config)
    name = registry.sampler_of(request, config)
    numbers = batch.samplers[name].numbers_of_request(request, asked.base)
    base = tuple(float(asked.base[one]) for one in BASE)
    return Sequence(numbers, True, False, False, 1, sampler=name, base=base)


def text_of(asked: Asked, rows: int, vocabulary: int, device: torch.device) -> RowText:
    """Texts in which a phrase of 40 tokens comes again and again, as DRY is there to find."""
    from vllm_entropix.rows.text import RowText

    phrase = torch.randint(vocabulary, (rows, 40), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    kept = phrase.repeat(1, asked.text // 40 + 1)[:, : asked.text].to(device)
    index = torch.arange(rows, device=device)
    return RowText(
        kept=kept,
        owners=index,
        positions=torch.full((rows,), asked.text - 1, device=device),
        drafts=torch.zeros(rows, dtype=torch.int64, device=device),
        input_ids=kept[:, -1].long(),
        index=index,
        longest=asked.text,
    )


def step(rows: int, vocabulary: int, device: torch.device, asked: Asked | None = None, unfiltered: bool = False) -> Step:
    """A step of this size, all of its rows drawn, by entropix or by the chain that is ``asked`` for.

    Args:
        rows: its rows.
        vocabulary: tokens of each.
        device: where it runs.
        asked: a chain in the place of entropix.
        unfiltered: entropix filters nothing, and vLLM neither: a temperature is all that there is.
    """
    import numpy as np

    from vllm_entropix.rows.batch import BatchSampler
    from vllm_entropix.rows.rows import Rows
    from vllm_entropix.samplers import registry

    server: dict[str, Any] = {} if asked is None else {"sampler": asked.chain}
    if unfiltered:
        server = {"regimes": False, "base": {"temperature": 0.8, "top_k": vocabulary, "top_p": 1.0, "min_p": 0.0}}
    config = registry.load_server({**server, "trace": {"alternatives": 0}})
    generator = torch.Generator().manual_seed(0)
    # Rows of every kind: flat to peaked, as a serving batch has them.
    logits = torch.randn(rows, vocabulary, generator=generator) * torch.linspace(0.5, 6.0, rows).unsqueeze(-1)
    logits = logits.to(device)
    work = torch.empty_like(logits)
    batch = BatchSampler(config, rows, None, device)
    batch.reserve(rows, vocabulary)
    sequence = sequence_of(batch, config, asked)
    for row in range(rows):
        batch.add(str(row), sequence)
    batch.sequences.flush()
    slots = batch.sequences.slots_of(map(str, range(rows)), rows)
    text = None if asked is None else text_of(asked, rows, vocabulary, device)
    described = Rows(
        slots=torch.from_numpy(slots).to(device),
        host_slots=np.asarray(slots),
        positions=torch.full((rows,), 10, device=device) if text is None else text.positions,
        input_ids=torch.zeros(rows, dtype=torch.int64, device=device) if text is None else text.input_ids,
        valid=torch.ones(rows, dtype=torch.bool, device=device),
        batch=torch.arange(rows, device=device),
        text=text,
    )
    own = (own_of_v2 if device.type == "cuda" else own_of_v1)(
        rows, device, *((None, None) if unfiltered else (config.base.top_k, config.base.top_p)), config.base.temperature
    )

    def vllm() -> object:
        return own.filtered(own.copied(work))

    def ours() -> object:
        batch.begin_step()
        copied = own.copied(work)
        batch.apply(copied, described, None)
        drawn = own.drawn(copied)
        if batch.waits_for_draw:
            batch.drawn(drawn.view(-1, 1))
        return drawn

    def transform() -> object:
        batch.begin_step()
        return batch.apply(work, described, None)

    def draw() -> object:
        return own.drawn(work)

    def metrics() -> object:
        return batch.backend.statistics(work)

    def read() -> object:
        return work.sum()

    name = "entropix" if asked is None else "chain"
    actions = {"vllm": vllm, name: ours, "transform": transform, "draw": draw, "metrics": metrics, "read": read}
    rival = None if unfiltered else flashinfer_sampler(work, config.base.top_k, config.base.top_p, config.base.temperature)
    if rival is not None:
        actions["flashinfer"] = rival
    return Step(lambda: work.copy_(logits), actions, batch)


def measure(
    rows: int, vocabulary: int, repeats: int, device: torch.device, asked: Asked | None = None, unfiltered: bool = False
) -> dict[str, object]:
    """Times and memory at one size."""
    one, name = step(rows, vocabulary, device, asked, unfiltered), "entropix" if asked is None else "chain"
    times = paired(one.actions, repeats, one.prepare, device.type == "cuda")
    one.prepare()
    extra = peak_extra_bytes(one.actions[name], device)
    rival = "flashinfer" in one.actions
    return {
        **({} if asked is None else {"chain": asked.chain, "text": asked.text}),
        **({"unfiltered": True, "transform_over_vllm": round(ratio(times, "transform", "vllm"), 4)} if unfiltered else {}),
        "rows": rows,
        "vocabulary": vocabulary,
        "median_ms": medians_ms(times),
        f"{name}_over_vllm": round(ratio(times, name, "vllm"), 4),
        **({f"{name}_over_flashinfer": round(ratio(times, name, "flashinfer"), 4)} if rival else {}),
        "metrics_over_read": round(ratio(times, "metrics", "read"), 4),
        "peak_extra_over_logits": round(extra / (4 * rows * vocabulary), 3),
    }


# What is on in any chain, and what else where each sampler is measured alone; llama.cpp leaves all of it off.
ON = {"dry_multiplier": 0.8, "dry_sequence_breakers": [0], "xtc_probability": 0.5}
ALONE = {
    "top_n_sigma": 1.5,
    "typ_p": 0.9,
    "dynatemp_range": 0.3,
    "top_a": 0.2,
    "repeat_penalty": 1.1,
    "edt_theta": 0.5,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "smoothing_factor": 0.2,
    "tfs_z": 0.9,
    "top_h": 0.4,
    "adaptive_target": 0.5,
}
# The request's own fields, as llama.cpp has them.
BASE = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.05}


def asked_for(text: str, wanted: Mapping[str, Any], tokens: int) -> Asked:
    """A chain of these names, with those of the ``wanted`` settings that its samplers have, behind so many tokens."""
    from vllm_entropix.samplers.chain import stages
    from vllm_entropix.samplers.chained import names_of

    known = {key for one in names_of(text) for key in stages()[one].Settings.model_fields}
    return Asked(text, {key: value for key, value in wanted.items() if key in known}, BASE, tokens)


def chains(options: argparse.Namespace) -> list[Asked | None]:
    """What is measured; None is entropix."""
    from vllm_entropix.samplers.chain import names

    if options.chain is None:
        return [None]
    found = []
    for text in names() if options.chain == "all" else (options.chain,):
        # What plans by itself is a chain with a name beside it.
        text = f"{text};temperature" if options.chain == "all" and text in ("min_p", "top_n_sigma", "entropix") else text
        asked = asked_for(text, ON | ALONE if options.chain == "all" else ON, options.text)
        found.append(replace(asked, settings=asked.settings | options.settings))
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler", description=__doc__)
    parser.add_argument("--rows", type=integers, default=[32], help="batch sizes, comma-separated (default: 32)")
    parser.add_argument("--vocab", type=integers, default=[128256], help="vocabulary sizes, comma-separated (default: 128256)")
    parser.add_argument("--repeats", type=int, default=20, help="paired rounds (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--chain", help="a chain in the place of entropix; `chain` is llama.cpp's default one, and all is each sampler alone"
    )
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="JSON: the chain's settings, of which some are on by default"
    )
    parser.add_argument("--unfiltered", action="store_true", help="a temperature alone: no top_k, no top_p, no min_p")
    parser.add_argument("--text", type=int, default=1024, help="tokens before each row, which DRY looks at (default: 1024)")
    add_out(parser)
    options = parser.parse_args()
    if options.unfiltered and options.chain:
        parser.error("--unfiltered is of entropix: it goes without --chain")
    quiet()
    import vllm.platforms

    vllm.platforms.current_platform.import_kernels()
    device = torch.device(options.device)
    results = []
    with torch.inference_mode():
        for vocabulary in options.vocab:
            for rows in options.rows:
                for asked in chains(options):
                    results.append(measure(rows, vocabulary, options.repeats, device, asked, options.unfiltered))
    finish("sampler", results, options.out)


if __name__ == "__main__":
    main()
