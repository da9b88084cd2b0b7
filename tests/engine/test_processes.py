"""Across processes: the engine in one of its own, the plugin switched off, the plugin installed and not asked for."""

import pytest

from tests.support.engine import close_engine, engine, generate
from tests.support.server import generate_in_process, run_vllm

pytestmark = pytest.mark.engine

PROMPTS = ["The quick brown fox", "0123456789", "a"]
SAMPLED = {"max_tokens": 16, "ignore_eos": True, "seed": 3}
GREEDY = {"max_tokens": 16, "ignore_eos": True, "temperature": 0.0}
REQUESTS = [
    [PROMPTS[0], {**SAMPLED, "extra_args": {"entropix_trace": "on"}}],
    [PROMPTS[1], {**SAMPLED, "temperature": 0.8, "top_k": 20, "extra_args": {"entropix": "off"}}],
    [PROMPTS[2], GREEDY],
]
SILENT = [[prompt, {name: value for name, value in params.items() if name != "extra_args"}] for prompt, params in REQUESTS]
CONFIG = {"clarification": {"text": "hm?"}, "attention": {"layers": "all"}}


def test_an_engine_in_its_own_process_gives_the_same(tiny):
    from vllm import SamplingParams

    llm = engine(tiny, sampler="entropix", sampler_config=CONFIG)
    outputs = generate(llm, PROMPTS, [SamplingParams(**params) for _, params in REQUESTS])
    here = [(list(o.outputs[0].token_ids), getattr(o.outputs[0], "entropix_trace", None)) for o in outputs]
    close_engine()
    there = generate_in_process(
        tiny, {"additional_config": {"entropix": CONFIG}, "distributed_executor_backend": "mp"}, REQUESTS
    )
    assert [result["token_ids"] for result in there] == [tokens for tokens, _ in here]
    assert [record["forced"] for record in there[0]["trace"]] == [record.forced for record in here[0][1]]
    for mine, other in zip(here[0][1], there[0]["trace"], strict=True):
        theirs = {**other, "alternatives": [part for pair in other["alternatives"] for part in pair]}
        ours = {**mine.to_dict(), "alternatives": [part for pair in mine.alternatives for part in pair]}
        for metric, value in ours.items():
            exact = value is None or isinstance(value, str | bool)
            assert theirs[metric] == (value if exact else pytest.approx(value, abs=1e-4)), metric
    assert there[1]["trace"] is there[2]["trace"] is None
    # A vLLM that is told to load other plugins only: the import alone makes the plugin known, in all processes.
    arguments = {"sampler": "entropix", "sampler_config": CONFIG}
    assert generate_in_process(tiny, arguments, REQUESTS, VLLM_PLUGINS="another") == there


def test_switched_off_or_not_asked_for_nothing_differs(tiny):
    close_engine()
    asked_and_off = generate_in_process(
        tiny,
        {"additional_config": {"entropix": CONFIG}},
        REQUESTS,
        VLLM_ENTROPIX_DISABLE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    not_asked = generate_in_process(tiny, {}, SILENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    without = generate_in_process(tiny, {}, SILENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="")
    assert asked_and_off == not_asked == without
    assert all(result["trace"] is None for result in without)


def test_switched_off_there_is_no_option():
    ended = run_vllm("serve", "some-model", "--sampler", "entropix", VLLM_ENTROPIX_DISABLE="1")
    assert ended.returncode == 2
    assert "unrecognized arguments: --sampler" in ended.stderr
