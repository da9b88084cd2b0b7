"""A real engine on Model Runner V2: statistics in every mode, steps that wait for nothing, rows by themselves."""

import contextlib
import dataclasses
import importlib.util
import json
import warnings

import pytest
import torch

from tests.gpu.modes import MODES, ON_A_CPU
from tests.support.dense import (
    METRICS,
    TRACED,
    Dense,
    assert_within,
    errors_to_dense,
    observed,
    of_kept_tokens,
    prompt,
    quantiles,
)
from tests.support.engine import adapter_of, engine, generate, worker_of

PROMPTS = [prompt(length, length) for length in (1, 15, 16, 17, 70, 200)]
TOKENS = 20 if torch.cuda.is_available() else 3  # an interpreter is slow
OF_A_STEP = ("begin_step", "after_forward", "transform")


def observing(folder, **arguments):
    """An engine that observes all layers; several processes may have one at once."""
    layers = {"attention": {"layers": "all"}}
    return engine(folder, sampler="entropix", sampler_config=layers, gpu_memory_utilization=0.2, **arguments)


def generate_mixed(llm):
    """All prompts once, of them every third traced and every third opted out; how many records each got."""
    from vllm import SamplingParams

    kinds = ({}, TRACED, {"entropix": "off"})
    settings = {"max_tokens": TOKENS, "ignore_eos": True}
    params = [SamplingParams(seed=seed, extra_args=kinds[seed % 3], **settings) for seed in range(len(PROMPTS))]
    outputs = generate(llm, [{"prompt_token_ids": one} for one in PROMPTS], params)
    return [len(getattr(output.outputs[0], "entropix_trace", None) or ()) for output in outputs]


def on_cpu(per_layer):
    """The statistics that were seen, where the dense ones are."""
    return [
        (ids, lengths.cpu(), dataclasses.replace(found, **{metric: getattr(found, metric).cpu() for metric in METRICS}))
        for ids, lengths, found in per_layer
    ]


@contextlib.contextmanager
def watched_steps(adapter):
    """Notes which of a step's methods were called, and where they waited for the device: (names, "file:line"s)."""
    called, waits = set(), set()

    def watched(name):
        original = getattr(adapter, name)

        def call(*args, **kwargs):
            called.add(name)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    return original(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)
                waits.update(f"{one.filename}:{one.lineno}" for one in told if "synchroniz" in str(one.message))

        return call

    for name in OF_A_STEP:
        setattr(adapter, name, watched(name))
    try:
        yield called, waits
    finally:
        for name in OF_A_STEP:
            delattr(adapter, name)


@pytest.mark.parametrize("name", MODES)
def test_mode(name, folder_of, request, record_property):
    on_gpu = torch.cuda.is_available()
    mode = MODES[name] if on_gpu else ON_A_CPU
    if mode.package and importlib.util.find_spec(mode.package) is None:
        pytest.skip(f"{mode.package} isn't installed")
    if mode.compiled:
        request.getfixturevalue("compiled")
    folder = folder_of(mode)
    llm = observing(folder, **mode.arguments)
    adapter, worker = adapter_of(llm), worker_of(llm)
    assert worker.vllm_config.use_v2_model_runner
    backends = {layer.attn_backend.get_name() for layer in adapter.observer.layers.values()}
    graphs = worker.vllm_config.compilation_config.cudagraph_mode.name
    record_property("backends", json.dumps(sorted(backends)))
    record_property("graphs", graphs)
    assert mode.backend is None or backends == {mode.backend}
    assert mode.arguments.get("compilation_config", {}).get("cudagraph_mode", graphs) == graphs

    # What is compared then finds compiled kernels, and prefixes in the cache.
    observed(llm, PROMPTS, max_tokens=2)
    outputs, per_layer = observed(llm, PROMPTS, max_tokens=TOKENS, logprobs=0)
    # The dense statistics are those of the tokens that this run generated: two runs needn't round alike.
    seen = on_cpu(per_layer)
    errors = errors_to_dense(outputs, of_kept_tokens(outputs, seen) if mode.drafts else seen, Dense(folder))
    record_property("errors", json.dumps({metric: quantiles(values) for metric, values in errors.items()}))
    # The first layer's queries and keys depend on no attention: errors of the others alone are the engine's own.
    record_property("first layer", json.dumps({metric: quantiles(values[:, 0]) for metric, values in errors.items()}))
    # Logits are kept until the draw where attention was measured: whoever wrote there in between would show here.
    of_tokens = [
        abs(record.logprob - position[token].logprob)
        for completion in (output.outputs[0] for output in outputs)
        for record, token, position in zip(completion.entropix_trace, completion.token_ids, completion.logprobs, strict=True)
    ]
    record_property("log-probabilities", max(of_tokens))
    rows = len(errors[METRICS[0]])
    record_property("rows", rows)
    if on_gpu:
        generate_mixed(llm)  # compiles what drawn rows need
        with watched_steps(adapter) as (called, waits):
            records = generate_mixed(llm)
        record_property("waits", json.dumps(sorted(waits)))
        assert called == set(OF_A_STEP)
    else:
        records, waits = generate_mixed(llm), set()

    assert bool(adapter.batch.lent) == (on_gpu and not mode.drafts)
    assert max(of_tokens) < 1e-3
    assert rows == len(PROMPTS) * TOKENS
    for metric, values in errors.items():
        assert_within(values, mode.bars, metric)
    assert records == [0, TOKENS, 0] * (len(PROMPTS) // 3)
    assert waits == set()


def test_rows_do_not_depend_on_the_batch(tiny):
    llm = observing(tiny, attention_backend="TRITON_ATTN", block_size=16)
    adapter = adapter_of(llm)
    seen = []
    original = adapter.observer.statistics_per_layer

    def spy(requests, positions, *wanted):
        together = original(requests, positions, *wanted)
        measured = [row for row in range(len(requests)) if not together.agreement[0, row].isnan()]
        alone = {row: original(requests[row : row + 1], positions[row : row + 1]) for row in measured}
        seen.append((together, alone))
        return together

    adapter.observer.statistics_per_layer = spy
    try:
        generate_mixed(llm)
    finally:
        adapter.observer.statistics_per_layer = original
    assert seen
    for together, alone in seen:
        for row, one in alone.items():
            for metric in METRICS:
                assert torch.equal(getattr(one, metric)[:, 0], getattr(together, metric)[:, row])
