"""The CPU's kernels are compiled when an engine starts, and no request waits for one."""

import pytest

from tests.support.engine import close_engine
from tests.support.server import result_of

pytestmark = pytest.mark.engine


def test_requests_find_all_kernels_compiled(tiny):
    close_engine()
    kernels = result_of("warm_up_script", tiny, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    for name in ("metrics_of_rows", "classify", "decide", "distribute_rows", "largest_of_rows", "_measure_rows"):
        assert kernels["started"][name], name
    assert kernels["served"] == kernels["started"]
