"""Made-up traces, for what reads them."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_entropix.distribution.constants import Constants
from vllm_entropix.records.line import TraceLine, prompt_hash, write_traces
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.records.schema import TokenEntry
from vllm_entropix.samplers.entropix.record import EntropixPart
from vllm_entropix.samplers.entropix.regimes import classify
from vllm_entropix.samplers.entropix.settings import EntropixConfig

CONFIG = EntropixConfig.preset()
# (entropy, varentropy) in the middle of each regime of the default preset, in the order of REGIMES.
CENTRES = ((0.02, 0.05), (6.0, 0.05), (2.0, 7.0), (6.0, 9.0), (2.0, 1.0))


def entry(token_id: int, entropy: float | None, varentropy: float | None, *, forced: bool = False) -> TokenEntry:
    """A token's entry; its regime follows from its metrics by the default preset."""
    values = [torch.tensor([float("nan") if value is None else value]) for value in (entropy, varentropy)]
    regime = REGIMES[int(classify(*values, Constants.from_config(CONFIG, torch.float32, "cpu")))]
    return TokenEntry(
        token_id=token_id,
        regime=regime,
        entropy=entropy,
        varentropy=varentropy,
        attention_entropy=1.25,
        attention_varentropy=0.5,
        agreement=0.0625,
        interaction_strength=3.5,
        temperature=0.666,
        top_p=0.9,
        top_k=27,
        min_p=0.03,
        confidence=4.5,
        forced=forced,
        alternatives=[(token_id, 0.75), (token_id + 1, 0.125), (token_id + 2, 0.0625)],
    )


def line(
    texts: Sequence[str],
    *,
    name: str = "request",
    index: int = 0,
    prompt: Sequence[int] = (1, 2, 3),
    prompt_text: str | None = None,
    metrics: Sequence[tuple[float | None, float | None]] = CENTRES,
    forced: Sequence[int] = (),
    not_kept: int = 0,
) -> TraceLine:
    """The trace of a sequence of these texts, whose tokens take their metrics in turn from ``metrics``."""
    ids = [100 + place % 1000 for place in range(len(texts))]
    made: dict[tuple[int, int, bool], TokenEntry] = {}  # entries are the same again and again in a long text
    records = []
    for place, token in enumerate(ids[: len(ids) - not_kept]):
        key = (token, place % len(metrics), place in forced)
        if key not in made:
            made[key] = entry(token, *metrics[key[1]], forced=key[2])
        records.append(made[key])
    seen = dict(zip(ids, texts, strict=True))
    others = {other: f"other {other}" for token in ids for other in (token + 1, token + 2) if other not in seen}
    return TraceLine(
        request_id=name,
        index=index,
        model="model",
        created="2026-01-02T03:04:05.678+00:00",
        sampler=EntropixPart.from_config(CONFIG),
        prompt_hash=prompt_hash(prompt),
        prompt=prompt_text,
        prompt_tokens=len(prompt),
        token_ids=ids,
        texts=list(texts),
        finish_reason="stop",
        not_kept=not_kept,
        records=records,
        alternative_texts=seen | others,
    )


def varied(tokens: int, seed: int, **arguments) -> TraceLine:
    """A sequence like a real one: all its numbers differ, so that they compress as badly."""
    numbers = random.Random(seed)
    made = line([numbers.choice((" word", " and", " lonely", ".", "\n")) for _ in range(tokens)], **arguments)
    made.records = [record.model_copy() for record in made.records]
    for record in made.records:
        for field in ("entropy", "varentropy", "attention_entropy", "attention_varentropy", "agreement", "confidence"):
            setattr(record, field, numbers.expovariate(1.0))
        record.interaction_strength, record.temperature = numbers.uniform(0, 12), numbers.uniform(0, 2)
        record.alternatives = [(numbers.randrange(100_000), numbers.random()) for _ in range(5)]
    made.alternative_texts = {token: f" w{token}" for record in made.records for token, _ in record.alternatives}
    return made


def written(path: Path, *lines: TraceLine) -> Path:
    """A file of traces."""
    with path.open("w", encoding="utf-8") as file:
        write_traces(file, lines)
    return path
