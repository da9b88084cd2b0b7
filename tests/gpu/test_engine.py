"""A real engine on Model Runner V2: statistics of every backend, CUDA graphs, asynchronous scheduling, no waiting."""

import dataclasses
import importlib.util

import pytest
import torch

from tests.support.dense import METRICS, TRACED, Dense, assert_close_to_dense, observed, prompt
from tests.support.engine import adapter_of, engine, generate, worker_of

ALL_LAYERS = {"attention": {"layers": "all"}}
# The only dtype that all backends have.
HALF = {"dtype": "float16", "block_size": 16}
BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
# Median, 97 % and the largest error: tests/support/test_dense.py says what right code and wrong code give.
HALF_BARS = (0.002, 0.01, 0.1)
# vLLM's Triton attention multiplies float32 as tf32.
TF32_BARS = (1e-3, 5e-3, 3e-2)
TOKENS = 20


def generate_traced(llm):
    """All prompts once, sampled and traced."""
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=6, ignore_eos=True, seed=seed, extra_args=TRACED) for seed in range(len(PROMPTS))]
    return generate(llm, [{"prompt_token_ids": one} for one in PROMPTS], params)


def on_cpu(per_layer):
    """The statistics that were seen, where the dense ones are."""
    return [
        (ids, lengths.cpu(), dataclasses.replace(found, **{metric: getattr(found, metric).cpu() for metric in METRICS}))
        for ids, lengths, found in per_layer
    ]


PROMPTS = [prompt(length, length) for length in (1, 15, 16, 17, 70, 200)]


def assert_right(llm, tiny, bars=HALF_BARS):
    """What an engine observes is right for the tokens that it generates itself: two runs needn't round alike."""
    outputs, per_layer = observed(llm, PROMPTS, max_tokens=TOKENS)
    assert assert_close_to_dense(outputs, on_cpu(per_layer), Dense(tiny), bars) == len(PROMPTS) * TOKENS


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_equal_the_dense_ones(tiny, backend):
    if backend == "FLASHINFER" and importlib.util.find_spec("flashinfer") is None:
        pytest.skip("FlashInfer isn't installed")
    llm = engine(tiny, sampler="entropix", sampler_config=ALL_LAYERS, attention_backend=backend, **HALF)
    assert type(worker_of(llm).model_runner).__module__.startswith("vllm.v1.worker.gpu.")
    layers = adapter_of(llm).observer.layers.values()
    assert {layer.attn_backend.get_name() for layer in layers} == {backend}
    assert_right(llm, tiny)


def test_statistics_in_float32(tiny):
    llm = engine(tiny, sampler="entropix", sampler_config=ALL_LAYERS, attention_backend="TRITON_ATTN", block_size=16)
    assert_right(llm, tiny, TF32_BARS)


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_captured_graphs(tiny, compiled, mode):
    # Compiled by the backend that changes no operation, so that nothing but the capture is new.
    compilation = {"mode": 3, "backend": "eager", "cudagraph_mode": mode, "cudagraph_capture_sizes": [1, 2, 4, 8]}
    llm = engine(
        tiny, enforce_eager=False, compilation_config=compilation, sampler="entropix", sampler_config=ALL_LAYERS, **HALF
    )
    assert worker_of(llm).vllm_config.compilation_config.cudagraph_mode.name == mode
    for _ in range(2):
        assert_right(llm, tiny)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_asynchronous_scheduling(tiny, asynchronous):
    llm = engine(tiny, async_scheduling=asynchronous, sampler="entropix", sampler_config=ALL_LAYERS, **HALF)
    assert_right(llm, tiny)


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
        generate_traced(llm)
    finally:
        adapter.observer.statistics_per_layer = original
    assert seen
    for together, alone in seen:
        for row, one in alone.items():
            for metric in METRICS:
                assert torch.equal(getattr(one, metric)[:, 0], getattr(together, metric)[:, row])


def test_steps_do_not_wait_for_the_device(tiny, monkeypatch):
    llm = engine(tiny, sampler="entropix", sampler_config=ALL_LAYERS, **HALF)
    generate_traced(llm)  # compiles the kernels
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
    generate_traced(llm)
    assert set(called) == {"begin_step", "after_forward", "transform"}
