"""Statistics from paged keys against those computed densely from the same model run by transformers."""

import pytest

from tests.support.dense import Dense, assert_equal_to_dense, observed, prompt
from tests.support.engine import engine

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


@pytest.fixture(scope="module")
def dense(tiny):
    return Dense(tiny)


@pytest.fixture
def llm(tiny):
    return engine(
        tiny,
        sampler="entropix",
        sampler_config={"attention": {"layers": "all"}},
        block_size=32,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
    )


def test_attention_of_the_model_is_peaked(dense):
    # Otherwise the comparisons below would hold for any keys: uniform attention has entropy log2 n.
    entropy = dense.run(prompt(64, 1))["attention_entropy"][:, -1]
    assert (entropy < 0.7 * 6).all()


def test_prompts_of_different_lengths_over_block_boundaries(llm, dense):
    prompts = [prompt(length, length) for length in (1, 5, 29, 31, 32)]
    outputs, per_layer = observed(llm, prompts, max_tokens=36)
    assert assert_equal_to_dense(outputs, per_layer, dense) == 5 * 36


def test_chunked_prefill(llm, dense):
    outputs, per_layer = observed(llm, [prompt(200, 7), prompt(150, 8), prompt(3, 9)], max_tokens=5)
    assert assert_equal_to_dense(outputs, per_layer, dense) == 3 * 5


def test_prefix_cache_hits(llm, dense):
    shared = prompt(96, 10)
    observed(llm, [shared], max_tokens=2)
    outputs, per_layer = observed(llm, [[*shared, *prompt(9, 11)], [*shared, *prompt(20, 12)]], max_tokens=4)
    assert all(output.num_cached_tokens == 96 for output in outputs)
    assert assert_equal_to_dense(outputs, per_layer, dense) == 2 * 4
