"""The requests whose answers are recorded: parts, each an engine of its own, and what is asked of it.

Settings and parameters are plain values of vLLM's and entropix's public names, so that they mean the same on either side of a
change. Every request but those called "unseeded" has a seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Values = dict[str, Any]

TRACED = {"entropix_trace": "on"}
OFF = {"entropix": "off"}

# What a request may differ in: parameters of SamplingParams, by name. "regex" stands for structured output.
VARIANTS: dict[str, Values] = {
    "default": {"extra_args": TRACED},
    "jax": {"extra_args": {**TRACED, "entropix_preset": "jax-2024-10"}},
    "torch": {"extra_args": {**TRACED, "entropix_preset": "torch-2024-10"}},
    "greedy": {"temperature": 0.0},
    "overridden": {
        "extra_args": {
            **TRACED,
            "entropix_temperature": 1.2,
            "entropix_top_p": 0.7,
            "entropix_top_k": 9,
            "entropix_min_p": 0.02,
        }
    },
    "own base": {
        "temperature": 0.9,
        "top_p": 0.8,
        "top_k": 12,
        "min_p": 0.05,
        "extra_args": {**TRACED, "entropix_base": "request"},
    },
    "off": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "extra_args": OFF},
    "greedy, traced": {"temperature": 0.0, "extra_args": TRACED},
    "several": {"n": 3, "extra_args": TRACED},
    "regex": {"regex": r"[a-f]{5}(hm\?|xyz)[a-f]{4}", "extra_args": TRACED},
    "hot": {"extra_args": {**TRACED, "entropix_temperature": 2.5, "entropix_top_k": 100, "entropix_top_p": 1.0}},
    "unforced": {"extra_args": {**TRACED, "entropix_clarification": "off"}},
    "logprobs": {"logprobs": 3, "extra_args": TRACED},
    "penalised": {"presence_penalty": 1.2, "frequency_penalty": 0.4, "repetition_penalty": 1.2, "extra_args": TRACED},
    "untraced": {},
    "preset's base": {"temperature": 1.4, "top_p": 0.5, "extra_args": {**TRACED, "entropix_base": "preset"}},
    "allowed": {"allowed_token_ids": list(range(64, 96)), "extra_args": TRACED},
    "off, logprobs": {"logprobs": 2, "temperature": 1.0, "extra_args": OFF},
    "biased": {"logit_bias": {70: 6.0, 71: 5.5, 72: 5.0}, "bad_words": ["the", "a"], "extra_args": TRACED},
    "unseeded": {"seed": None, "extra_args": TRACED},
    "stopped": {"stop": [".", "e"], "min_tokens": 6, "include_stop_str_in_output": True, "extra_args": TRACED},
    "off, greedy": {"temperature": 0.0, "extra_args": OFF},
    "torch, own base": {
        "temperature": 1.1,
        "top_k": 40,
        "extra_args": {**TRACED, "entropix_preset": "torch-2024-10", "entropix_base": "request"},
    },
    "prompt's logprobs": {"prompt_logprobs": 1, "logprobs": 1, "extra_args": TRACED},
}
# A grammar is compiled beside the engine, which takes no fixed number of steps: such a request must not share a batch.
ALONE = frozenset({"regex"})

# For the shipped model: places where it is sure, torn, lost, and in the mist.
STORIES = [
    {"chat": "What is 384 + 259?"},
    "Once upon a time, by the quiet river, there lived a curious otter called Hugo. More than anything he loved his silver "
    "whistle. One windy morning the whistle was gone. He found a box. In it there was a",
    {"chat": "What is in the sealed box?"},
    "Long ago, a patient goose called Otto lived under the old bridge. One night a storm shook the trees. Then a thick mist "
    "came down. Out of the mist there came a",
    {"chat": "I am taking the train to Maplewick. From memory, where does my train go?"},
    "Rosa was a cheerful owl. She lived behind the mill. It was the birthday of Pip the mouse, and Rosa wanted to bake a cake. "
    "But there was no honey. So she went out to buy some honey. As on every day, the postman brought a",
    {"chat": "What has keys but opens no door?"},
]
# For the model with random weights: texts that repeat themselves, so that a drafter finds something to propose.
LETTERS = ["abcabcabcabcabc", "The quick brown fox", "xyxyxyxyxyxy", "x" * 90, "hello hello hello", "hm?hm?abhm?", "0123456789"]

# vLLM refuses min_p and logit_bias together with speculation.
NOT_SPECULATED = ("own base", "biased")

STORY_SETTINGS: Values = {
    "thresholds": {"helv": {"varentropy_below": 4.5}},
    "clarification": {"text": " ... hmm, which one?", "cooldown": 4},
}
# Borders among which the random model's tokens fall into every regime.
LETTER_THRESHOLDS: Values = {
    "lelv": {"entropy_below": 2.0, "varentropy_below": 4096.0},
    "helv": {"entropy_above": 3.6, "varentropy_below": 6.5},
    "lehv": {"entropy_below": 2.9, "varentropy_above": 5.0},
    "hehv": {"entropy_above": 3.2, "varentropy_above": 6.5},
}


@dataclass(frozen=True)
class Part:
    """One engine, and what is asked of it.

    Attributes:
        model: "shipped" for the one in the package, "random" for a tiny one with random weights.
        settings: of entropix, as ``additional_config`` takes them.
        requests: how many; they go through VARIANTS and the model's prompts.
        first: the variant to begin with, so that a short part has others than the part before.
        tokens: most tokens of an answer.
        runner: vLLM's model runner, "v1" or "v2"; on a CPU the kernels of v2 are interpreted.
        engine: further arguments of ``LLM``; "DRAFT" as a model is the small sibling of the shipped one.
        without: variants that this engine refuses.
    """

    model: str
    settings: Values
    requests: int
    first: int = 0
    tokens: int = 32
    runner: str = "v1"
    engine: Values = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def asked(self) -> Iterator[tuple[str, Any, Values]]:
        """(name, prompt, parameters) of each request; a prompt is a text or a chat's question."""
        prompts = STORIES if self.model == "shipped" else LETTERS
        variants = [name for name in VARIANTS if name not in self.without]
        for number in range(self.requests):
            name = variants[(self.first + number) % len(variants)]
            parameters = {"max_tokens": self.tokens, "seed": 1000 + number, **VARIANTS[name]}
            if self.model == "random":
                parameters["ignore_eos"] = True
            yield f"{number:02} {name}", prompts[number % len(prompts)], parameters

    def digest(self) -> str:
        """SHA-256 of all that it asks, and how."""
        return hashlib.sha256(repr((self, list(self.asked()))).encode()).hexdigest()


PARTS: dict[str, Part] = {
    "v1": Part("shipped", STORY_SETTINGS, 52),
    "v1, original": Part(
        "shipped",
        {
            **STORY_SETTINGS,
            "preset": "torch-2024-10",
            "fidelity": "original",
            "attention": {"layers": "all"},
            "clarification": {"token_ids": [70, 71, 72], "rule": "last-token"},
        },
        28,
        first=4,
    ),
    "v1, cramped": Part(  # prompts in chunks, preemption, and a cache of prefixes
        "random",
        {
            "thresholds": LETTER_THRESHOLDS,
            "base": {"source": "request"},
            "attention": {"layers": [0]},
            "clarification": {"text": "hm?", "rule": "ever"},
            "trace": {"default": True, "alternatives": 0},
        },
        24,
        first=8,
        engine={
            "max_num_batched_tokens": 64,
            "enable_chunked_prefill": True,
            "num_gpu_blocks_override": 14,
            "max_model_len": 256,
            "logprobs_mode": "processed_logprobs",
        },
    ),
    "v1, logits only": Part(
        "random",
        {"regimes": False, "attention": {"enabled": False}, "trace": {"default": True, "alternatives": 20}},
        12,
        first=16,
    ),
    "v2": Part("shipped", STORY_SETTINGS, 26, tokens=20, runner="v2"),
    "v2, original": Part(
        "random",
        {
            "thresholds": LETTER_THRESHOLDS,
            "fidelity": "original",
            "attention": {"layers": "all"},
            "clarification": {"token_ids": [72, 77, 63], "rule": "ever"},
        },
        16,
        first=2,
        tokens=20,
        runner="v2",
        engine={"logprobs_mode": "processed_logprobs"},
    ),
    "v2, ngram": Part(
        "random",
        {
            "thresholds": LETTER_THRESHOLDS,
            "clarification": {"text": "hm?", "cooldown": 2, "max_per_request": 1000},
        },
        16,
        tokens=24,
        runner="v2",
        engine={
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_min": 1,
                "prompt_lookup_max": 3,
            }
        },
        without=NOT_SPECULATED,
    ),
    "v2, draft model": Part(
        "shipped",
        STORY_SETTINGS,
        10,
        first=4,
        tokens=16,
        runner="v2",
        engine={
            "speculative_config": {
                "method": "draft_model",
                "model": "DRAFT",
                "num_speculative_tokens": 2,
                "draft_sample_method": "probabilistic",
            },
            "max_model_len": 256,
        },
        without=NOT_SPECULATED,
    ),
    "two ranks": Part(
        "shipped",
        {**STORY_SETTINGS, "attention": {"layers": "all"}},
        16,
        first=12,
        tokens=24,
        engine={"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    ),
}
