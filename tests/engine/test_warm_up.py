"""The CPU's kernels are compiled when an engine starts, and no request waits for one."""

import pytest

from tests.support.engine import close_engine
from tests.support.server import result_of

pytestmark = pytest.mark.engine


def test_requests_find_all_kernels_compiled(tiny):
    close_engine()
    kernels = result_of("warm_up_script", tiny, timeout=500, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for name in ("metrics_of_rows", "classify", "decide", "distribute_rows", "largest_of_rows", "_measure_rows"):
        assert kernels["started"][name], name
    assert kernels["served"] == kernels["started"]
    # That of chains isn't, on a server of another sampler: the first request has another process compile it.
    chains = kernels["chains"]
    assert not kernels["served"]["chain_of_rows"]
    assert chains["compiled"]["chain_of_rows"] == 1
    assert chains["called"] == chains["compiled"]
    assert chains["drawn"] == chains["meanwhile"]
