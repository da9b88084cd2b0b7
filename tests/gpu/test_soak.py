"""20,000 requests with aborts and preemptions leave memory as it was."""

import pytest

from tests.gpu.soak import soak
from tests.support.engine import engine

REQUESTS = 20_000


@pytest.mark.timeout(3600)
def test_memory_stays_flat(tiny):
    # Room for about a third of what runs at once.
    llm = engine(
        tiny,
        sampler="entropix",
        sampler_config={"attention": {"layers": "all"}, "clarification": {"text": " wait"}},
        dtype="float16",
        block_size=16,
        max_num_seqs=64,
        max_model_len=256,
        kv_cache_memory_bytes=64 * 2 * 2 * 2 * 2 * 64 * 32,
    )
    census = soak(llm, REQUESTS)
    assert census.finished + census.aborted == REQUESTS
    assert census.aborted > REQUESTS // 100
    assert census.preempted > 100
    assert census.left == 0
    # From the second point on: the first requests fill caches and compile kernels.
    assert max(census.memory[1:]) - min(census.memory[1:]) < 16 << 20
    assert census.resident[-1] - census.resident[1] < 64 << 10
