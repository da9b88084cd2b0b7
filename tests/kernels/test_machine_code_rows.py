"""What the machine code of a sampler step's kernels says, compiled for three GPUs as a step launches them; it takes none."""

import pytest

from tests.kernels.test_triton import result_of
from tests.support.machine_code import SHARED

READING_LOGITS = {"_measure_tile", "_distribute", "_begin", "_tally", "_count_values", "_write"}
KERNELS = {"_merge_tiles", "_want_attention", "_decide", "_choose", "_choose_value", *READING_LOGITS}


@pytest.fixture(scope="module")
def found():
    return result_of("row_code_checks", "v1")


@pytest.fixture(scope="module", params=SHARED)
def codes(request, found):
    """An A100's, an H100's, a B200's."""
    return request.param, found["codes"] if request.param == 90 else result_of("row_code_checks", "v1", request.param)["codes"]


def test_every_size_of_a_step_takes_the_same_code(found):
    # 1 to 1024 rows: no request waits for a compiler.
    assert found["variants"] == dict.fromkeys(KERNELS, 1)


def test_registers_and_shared_memory(codes):
    capability, codes = codes
    assert {code["name"] for code in codes.values()} == KERNELS
    for what, code in codes.items():
        assert code["registers"] <= 168, what
        assert code["spills"] == 0, what
        assert code["shared"] <= SHARED[capability], what
        # Sixteen warps on a multiprocessor at least: while one waits, another works.
        assert code["registers"] * 32 * 16 <= 65536, what


def test_logits_are_read_four_bytes_at_a_time_at_least(codes):
    for what, code in codes[1].items():
        if code["name"] in READING_LOGITS:
            assert not code["narrow_loads"], what
