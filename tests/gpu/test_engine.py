"""A real engine on Model Runner V2: statistics of every backend, CUDA graphs, asynchronous scheduling, no waiting."""

import dataclasses
import importlib.util

import pytest
import torch

from tests.support.dense import METRICS, TRACED, Dense, assert_equal_to_dense, observed, prompt
from tests.support.engine import adapter_of, engine, generate, worker_of

ALL_LAYERS = {"attention": {"layers": "all"}}
# The only dtype that all backends have; scores differ from float32's in the third digit.
HALF = {"dtype": "float16", "block_size": 16}
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")


def sampled(seed, tokens=24):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed, extra_args=TRACED)


def results(llm, prompts, tokens=24):
    """Tokens, and per token its regime and metrics."""
    requests = [{"prompt_token_ids": one} for one in prompts]
    outputs = generate(llm, requests, [sampled(seed, tokens) for seed in range(len(prompts))])
    traces = [output.outputs[0].entropix_trace for output in outputs]
    numbers = [[[record.entropy, *(getattr(record, metric) for metric in METRICS)] for record in trace] for trace in traces]
    return [list(output.outputs[0].token_ids) for output in outputs], torch.tensor(numbers, dtype=torch.float64)


def on_cpu(per_layer):
    """The statistics that were seen, where the dense ones are."""
    return [
        (ids, lengths.cpu(), dataclasses.replace(found, **{metric: getattr(found, metric).cpu() for metric in METRICS}))
        for ids, lengths, found in per_layer
    ]


PROMPTS = [prompt(length, length) for length in (1, 15, 16, 17, 70, 200)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_equal_the_dense_ones(tiny, backend):
    if backend == "FLASHINFER" and importlib.util.find_spec("flashinfer") is None:
        pytest.skip("FlashInfer isn't installed")
    llm = engine(tiny, sampler="entropix", sampler_config=ALL_LAYERS, attention_backend=backend, **HALF)
    assert type(worker_of(llm).model_runner).__module__.startswith("vllm.v1.worker.gpu.")
    layers = adapter_of(llm).observer.layers.values()
    assert {layer.attn_backend.get_name() for layer in layers} == {backend}
    outputs, per_layer = observed(llm, PROMPTS, max_tokens=20)
    assert assert_equal_to_dense(outputs, on_cpu(per_layer), Dense(tiny), tolerance=3e-2) == len(PROMPTS) * 20


def test_statistics_in_float32(tiny):
    # Without the rounding of half precision: what is left is the order of sums.
    llm = engine(tiny, sampler="entropix", sampler_config=ALL_LAYERS, attention_backend="TRITON_ATTN", block_size=16)
    outputs, per_layer = observed(llm, PROMPTS, max_tokens=20)
    assert assert_equal_to_dense(outputs, on_cpu(per_layer), Dense(tiny), tolerance=2e-3) == len(PROMPTS) * 20


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_captured_graphs_equal_eager(tiny, compiled, mode):
    common = {"sampler": "entropix", "sampler_config": ALL_LAYERS, **HALF}
    want_tokens, want = results(engine(tiny, **common), PROMPTS)
    # Compiled by the backend that changes no operation, so that nothing but the capture differs.
    compilation = {"mode": 3, "backend": "eager", "cudagraph_mode": mode, "cudagraph_capture_sizes": [1, 2, 4, 8]}
    llm = engine(tiny, enforce_eager=False, compilation_config=compilation, **common)
    assert worker_of(llm).vllm_config.compilation_config.cudagraph_mode.name == mode
    for _ in range(2):
        got_tokens, got = results(llm, PROMPTS)
        assert got_tokens == want_tokens
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_asynchronous_scheduling(tiny):
    common = {"sampler": "entropix", "sampler_config": ALL_LAYERS, **HALF}
    want_tokens, want = results(engine(tiny, async_scheduling=False, **common), PROMPTS)
    got_tokens, got = results(engine(tiny, async_scheduling=True, **common), PROMPTS)
    assert got_tokens == want_tokens
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_rows_do_not_depend_on_the_batch(tiny):
    llm = engine(tiny, sampler="entropix", sampler_config=ALL_LAYERS, attention_backend="TRITON_ATTN", block_size=16)
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
        results(llm, PROMPTS, tokens=6)
    finally:
        adapter.observer.statistics_per_layer = original
    assert seen
    for together, alone in seen:
        for row, one in alone.items():
            for metric in METRICS:
                assert torch.equal(getattr(one, metric)[:, 0], getattr(together, metric)[:, row])


def test_steps_do_not_wait_for_the_device(tiny, monkeypatch):
    llm = engine(tiny, sampler="entropix", sampler_config=ALL_LAYERS, **HALF)
    results(llm, PROMPTS)  # compiles the kernels
    adapter = adapter_of(llm)
    called = []

    def watched(name):
        original = getattr(adapter, name)

        def call(*args, **kwargs):
            called.append(name)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return original(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    for name in ("begin_step", "after_forward", "transform"):
        monkeypatch.setattr(adapter, name, watched(name))
    results(llm, PROMPTS)
    assert set(called) == {"begin_step", "after_forward", "transform"}
