"""Measures a trained demo model on held-out text: perplexity, accuracy, regimes, and the designed places.

python tools/demo_model/evaluate.py --model vllm_entropix/demo_model --output tools/demo_model/evaluation.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from corpus import HELD_OUT_SEED, WEIGHTS, Corpus
from problems import PROBLEMS
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import IGNORED, Encoded, encode
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from vocab import END, EOS, PAD, token_id
from words import CLARIFICATION
from writer import Doc

from vllm_entropix import EntropixConfig
from vllm_entropix.distribution.constants import Constants
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.samplers.entropix.regimes import classify
from vllm_entropix.sampling import Regime

#: The regime for which each kind of designed place was made.
DESIGNED = {"evenly_lost": "HELV", "mostly_this": "LEHV", "in_the_mist": "HEHV"}

#: Families whose evenly lost place has a right answer that can be checked.
CLARIFIABLE = ("memory", "riddle", "guessing game")

BATCH = 64


@dataclass
class Model:
    """A model with its tokenizer."""

    network: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Model:
        """Load the weights as shipped; ``dtype`` is that of the computation."""
        network = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        network.eval()
        return cls(network, AutoTokenizer.from_pretrained(folder))

    def token(self, name: str) -> int:
        """The id of a special token."""
        return token_id(self.tokenizer.backend_tokenizer, name)

    @torch.inference_mode()
    def logits(self, items: Sequence[Encoded]) -> Tensor:
        """Teacher-forced logits of documents, padded on the right."""
        width = max(len(item.tokens) for item in items)
        tokens = torch.full((len(items), width), self.token(PAD))
        for row, item in enumerate(items):
            tokens[row, : len(item.tokens)] = torch.tensor(item.tokens)
        logits: Tensor = self.network(input_ids=tokens).logits
        return logits

    @torch.inference_mode()
    def complete(self, prompts: Sequence[str], limit: int, sample: bool = False) -> list[str]:
        """Continue each prompt, greedily or by sampling at temperature 1, until it ends."""
        texts: list[str] = []
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        for first in track(range(0, len(order), BATCH), description="generating", transient=True):
            group = [prompts[at] for at in order[first : first + BATCH]]
            inputs = self.tokenizer(group, return_tensors="pt", padding=True, padding_side="left")
            output = self.network.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=limit,
                do_sample=sample,
                eos_token_id=[self.token(EOS), self.token(END)],
                pad_token_id=self.token(PAD),
            )
            texts += self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
        back = sorted(range(len(order)), key=lambda at: order[at])
        return [texts[at].replace(PAD, "") for at in back]


@dataclass
class Tally:
    """Sums over the tokens of one family."""

    documents: int = 0
    tokens: int = 0
    nats: float = 0.0
    regimes: Counter[str] = field(default_factory=Counter)


@dataclass
class Place:
    """Sums over the designed places of one kind."""

    entropies: list[float] = field(default_factory=list)
    varentropies: list[float] = field(default_factory=list)
    regimes: Counter[str] = field(default_factory=Counter)

    def summary(self, wanted: str) -> dict[str, Any]:
        """Figures for the report."""
        entropies, varentropies = sorted(self.entropies), sorted(self.varentropies)
        count = len(entropies)
        return {
            "regime": wanted,
            "places": count,
            "in_regime": round(self.regimes[wanted] / count, 4),
            "entropy_median": round(entropies[count // 2], 3),
            "varentropy_median": round(varentropies[count // 2], 3),
            "varentropy_5_percent": round(varentropies[count // 20], 3),
            "varentropy_95_percent": round(varentropies[count * 19 // 20], 3),
        }


def teacher_forced(model: Model, documents: int, config: EntropixConfig) -> tuple[dict[str, Tally], dict[str, Place]]:
    """Perplexity, regimes and designed places of held-out documents in the mixture of the corpus."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    places: dict[str, Place] = defaultdict(Place)
    constants = Constants.from_config(config, torch.float32, "cpu")
    stream = islice(Corpus(HELD_OUT_SEED, held_out=True).mixed(), documents)
    items = sorted(encode(model.tokenizer.backend_tokenizer, stream), key=lambda item: len(item.tokens))
    for first in track(range(0, len(items), 16), description="reading", transient=True):
        group = items[first : first + 16]
        logits = model.logits(group).float()
        metrics = LogitsMetrics.from_logits(logits.flatten(0, 1))
        regimes = classify(metrics.entropy, metrics.varentropy, constants).view(logits.shape[:2])
        entropies, varentropies = metrics.entropy.view(regimes.shape), metrics.varentropy.view(regimes.shape)
        for row, item in enumerate(group):
            family = item.doc.family.removesuffix(" (chat)")
            tally = tallies[family]
            tally.documents += 1
            marks = {mark.offset: mark.kind for mark in item.doc.marks}
            for at in range(1, len(item.tokens)):
                regime = Regime(int(regimes[row, at - 1])).name
                # A forced clarification is mute, but the distribution in front of it is as good as any.
                if item.starts[at] in marks:
                    place = places[marks[item.starts[at]]]
                    place.entropies.append(float(entropies[row, at - 1]))
                    place.varentropies.append(float(varentropies[row, at - 1]))
                    place.regimes[regime] += 1
                if item.labels[at] == IGNORED:
                    continue
                tally.tokens += 1
                tally.nats -= float(torch.log_softmax(logits[row, at - 1], -1)[item.tokens[at]])
                tally.regimes[regime] += 1
    return tallies, places


def answer_of(text: str) -> str:
    """The stated answer of a completion."""
    found = re.findall(r"(?:The answer is|You said:) ([^.<]*)\.", text)
    return str(found[-1]) if found else ""


def accuracy(model: Model, count: int) -> dict[str, dict[str, float]]:
    """Exact-match accuracy of greedy answers to held-out problems, by family."""
    corpus = Corpus(HELD_OUT_SEED + 1, held_out=True)
    report: dict[str, dict[str, float]] = {}
    for family in PROBLEMS:
        seen: set[str] = set()
        docs: list[Doc] = []
        while len(docs) < count:
            doc = corpus.write(family, chat=len(docs) % 2 == 1)
            if doc.text[: doc.prompt] not in seen:
                seen.add(doc.text[: doc.prompt])
                docs.append(doc)
        texts = model.complete([doc.text[: doc.prompt] for doc in docs], limit=260)
        right = sum(answer_of(text) == doc.answer for text, doc in zip(texts, docs, strict=True))
        exact = sum(doc.text[doc.prompt :] == text for text, doc in zip(texts, docs, strict=True))
        report[family] = {"problems": count, "accuracy": round(right / count, 4), "working_exact": round(exact / count, 4)}
    return report


def clarified(model: Model, count: int) -> dict[str, dict[str, float]]:
    """Accuracy at evenly lost places that have an answer: decided greedily, and with the clarification forced."""
    corpus = Corpus(HELD_OUT_SEED + 2, held_out=True)
    report: dict[str, dict[str, float]] = {}
    for family in CLARIFIABLE:
        prompts: list[str] = []
        wanted: list[str] = []
        while len(prompts) < count:
            # A forced document shows the right answer, which is its last word.
            doc = corpus.write(family, forced=True)
            at = doc.marks[0].offset
            if not doc.text[at:].startswith(CLARIFICATION):
                continue
            prompts.append(doc.text[:at])
            wanted.append(re.findall(r"(\w+)\.<\|e", doc.text)[-1])
        plain = [re.match(r"\s*(\w*)", text) for text in model.complete(prompts, limit=2)]
        lucky = sum(bool(found) and found.group(1) == word for found, word in zip(plain, wanted, strict=True) if found)
        settled = model.complete([prompt + CLARIFICATION for prompt in prompts], limit=60)
        right = sum(text.endswith((f" {word}.{EOS}", f" {word}.{END}")) for text, word in zip(settled, wanted, strict=True))
        report[family] = {
            "places": count,
            "greedy_accuracy": round(lucky / count, 4),
            "clarified_accuracy": round(right / count, 4),
        }
    return report


def stories_end(model: Model, count: int) -> dict[str, float]:
    """Whether sampled stories come to an end, and keep their hero."""
    torch.manual_seed(HELD_OUT_SEED)
    corpus = Corpus(HELD_OUT_SEED + 3, held_out=True)
    prompts: list[str] = []
    while len(prompts) < count:
        doc = corpus.write("story", chat=True)
        prompts.append(doc.text[: doc.text.index("<|assistant|>") + len("<|assistant|>")])
    texts = model.complete(prompts, limit=500, sample=True)
    ended = [text for text in texts if text.endswith(END)]
    words = [len(text.split()) for text in ended]
    return {
        "stories": count,
        "ended": round(len(ended) / count, 4),
        "words_mean": round(sum(words) / max(1, len(words)), 1),
        "words_longest": max(words, default=0),
    }


def show(console: Console, report: dict[str, Any]) -> None:
    """Print the report as tables."""
    table = Table("family", "documents", "tokens", "perplexity", *Regime.__members__, title="held-out text")
    for family, row in report["families"].items():
        shares = [f"{100 * row['regimes'][name]:.1f} %" for name in Regime.__members__]
        table.add_row(family, str(row["documents"]), str(row["tokens"]), f"{row['perplexity']:.3f}", *shares)
    console.print(table)
    table = Table("family", "problems", "right answer", "whole working exact", title="held-out problems, greedy")
    for family, row in report["accuracy"].items():
        table.add_row(family, str(row["problems"]), f"{100 * row['accuracy']:.1f} %", f"{100 * row['working_exact']:.1f} %")
    console.print(table)
    for name in ("places", "places_bfloat16"):
        table = Table("place", "regime", "places", "in regime", "entropy", "varentropy", "5 % - 95 %", title=name)
        for kind, row in report[name].items():
            spread = f"{row['varentropy_5_percent']} - {row['varentropy_95_percent']}"
            table.add_row(
                kind, row["regime"], str(row["places"]), f"{100 * row['in_regime']:.1f} %",
                str(row["entropy_median"]), str(row["varentropy_median"]), spread,
            )  # fmt: skip
        console.print(table)
    table = Table("family", "places", "greedy", "clarified", title="accuracy at evenly lost places")
    for family, row in report["clarified"].items():
        greedy, settled = row["greedy_accuracy"], row["clarified_accuracy"]
        table.add_row(family, str(row["places"]), f"{100 * greedy:.1f} %", f"{100 * settled:.1f} %")
    console.print(table)
    console.print("stories:", report["stories"])


def main() -> None:
    """Evaluate a model folder and write the figures."""
    parser = argparse.ArgumentParser(description="Measure a trained demo model on held-out text.")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument(
        "--sampler-config", type=Path, help="settings whose thresholds count (default: the folder's entropix.toml)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures (default: only print)")
    parser.add_argument("--documents", type=int, default=1500, help="held-out documents to read (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems a family (default: %(default)s)")
    parser.add_argument("--stories", type=int, default=64, help="stories to sample (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    console = Console()
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    model = Model.load(args.model, torch.float32)
    config = EntropixConfig.load(str(args.sampler_config or args.model / "entropix.toml"))
    tallies, places = teacher_forced(model, args.documents, config)
    total = Tally()
    for tally in tallies.values():
        total.documents += tally.documents
        total.tokens += tally.tokens
        total.nats += tally.nats
        total.regimes += tally.regimes
    rows = {name: tallies[name] for name in WEIGHTS if name in tallies} | {"all": total}
    _, rough = teacher_forced(Model.load(args.model, torch.bfloat16), max(1, args.documents // 4), config)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{args.threads}-core {platform.machine()} CPU, torch {torch.__version__.split('+')[0]}",
        "thresholds": config.thresholds.model_dump(),
        "computed_in": "float32, from the bfloat16 weights as shipped",
        "families": {
            name: {
                "documents": tally.documents,
                "tokens": tally.tokens,
                "perplexity": round(math.exp(tally.nats / tally.tokens), 4),
                "regimes": {kind: round(tally.regimes[kind] / tally.tokens, 4) for kind in Regime.__members__},
            }
            for name, tally in rows.items()
        },
        "accuracy": accuracy(model, args.problems),
        "places": {kind: places[kind].summary(wanted) for kind, wanted in DESIGNED.items()},
        "places_bfloat16": {kind: rough[kind].summary(wanted) for kind, wanted in DESIGNED.items()},
        "clarified": clarified(model, args.problems),
        "stories": stories_end(model, args.stories),
    }
    report["seconds"] = round(time.monotonic() - began)
    show(console, report)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
