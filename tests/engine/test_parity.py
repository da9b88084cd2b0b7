"""Model Runner V1 and V2 agree: the same tokens where nothing is drawn, and the same traces, in float32."""

import pytest

from tests.support import runners
from tests.support.engine import close_engine, engine, generate
from tests.support.server import generate_in_process
from vllm_entropix import traces

# Model Runner V2 runs in the process that this test starts.
pytestmark = [pytest.mark.engine, pytest.mark.skipif(runners.is_v2(), reason="runs V1 here, and V2 in a process of its own")]

TRACED = {"entropix_trace": "on"}
# Sure (argmax) below an entropy, lost above it, and without a cooldown whoever is lost is given the clarification each time:
# nothing is left to chance.
CONFIG = {
    "thresholds": {
        "lelv": {"entropy_below": 2.0, "varentropy_below": 4096.0},
        "helv": {"entropy_above": 1.9, "varentropy_below": 4096.0},
    },
    "clarification": {"text": "hm?", "cooldown": 0, "max_per_request": 1000},
    "attention": {"layers": "all"},
}
ARGUMENTS = {
    "max_num_batched_tokens": 64,  # the long prompt comes in two chunks
    "enable_chunked_prefill": True,
    "block_size": 32,
    "num_gpu_blocks_override": 14,  # some are preempted
    "max_model_len": 256,
    "max_num_seqs": 8,
}
GREEDY = {"temperature": 0.0}
REQUESTS = [
    ["The quick brown fox", {}],
    ["x" * 90, {}],
    ["hello hello hello", {"presence_penalty": 1.5, "repetition_penalty": 1.2}],
    ["0123456789", {**GREEDY, "allowed_token_ids": list(range(64, 80))}],
    [
        "once upon a time",
        {"extra_args": {**TRACED, "entropix_preset": "torch-2024-10", "entropix_clarification": "off"}, **GREEDY},
    ],
    ["zzzz", {**GREEDY, "bad_words": ["<400>", "<401>"], "min_tokens": 8}],
    ["opted out", {**GREEDY, "extra_args": {"entropix": "off"}}],
]


def test_tokens_and_traces_agree(tiny):
    requests = [
        [prompt, {"max_tokens": 48, "ignore_eos": True, "extra_args": TRACED, **settings}] for prompt, settings in REQUESTS
    ]
    here = on_this_runner(tiny, requests)
    close_engine()
    there = generate_in_process(
        tiny,
        {"additional_config": {"entropix": CONFIG}, **ARGUMENTS},
        requests,
        **{**runners.environment("v2"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    seen = set()
    for (tokens, trace), other in zip(here, there, strict=True):
        assert other["token_ids"] == tokens
        assert (trace is None) == (other["trace"] is None)
        for mine, theirs in zip(trace or (), other["trace"] or (), strict=True):
            assert comparable(theirs) == comparable(mine)
            seen.add((mine["regime"], mine["forced"]))
    assert {("LELV", False), ("HELV", True)} <= seen


def on_this_runner(model, requests):
    """Tokens and records of each request."""
    from vllm import SamplingParams

    llm = engine(model, sampler="entropix", sampler_config=CONFIG, **ARGUMENTS)
    assert not llm.llm_engine.vllm_config.use_v2_model_runner
    outputs = generate(llm, [prompt for prompt, _ in requests], [SamplingParams(**settings) for _, settings in requests])
    records = [None if trace is None else [record.to_dict() for record in trace] for [trace] in map(traces, outputs)]
    return [(list(output.outputs[0].token_ids), found) for output, found in zip(outputs, records, strict=True)]


def comparable(record):
    """A record, its numbers to be equal within 1e-4; alternatives of about the same probability may change places."""
    probabilities = [probability for _, probability in record["alternatives"]]
    return {
        name: value if value is None or isinstance(value, str | bool) else pytest.approx(value, abs=1e-4, rel=1e-4)
        for name, value in {**record, "alternatives": None, **{f"p{i}": p for i, p in enumerate(probabilities)}}.items()
    }
