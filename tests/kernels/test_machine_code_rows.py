"""What the machine code of a sampler step's kernels says, compiled for three GPUs as a step launches them; it takes none."""

import re
from pathlib import Path

import pytest

from tests.kernels.test_triton import result_of
from tests.support.machine_code import SHARED
from vllm_entropix.kernels.triton_ import candidates, logits_metrics, wide_filters
from vllm_entropix.kernels.triton_.chain import launch

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
# An H100's bytes a second, multiprocessors, schedulers of each, cycles a second.
BANDWIDTH, MULTIPROCESSORS, SCHEDULERS, CLOCK = 3.35e12, 132, 4, 1.7e9
ROWS, VOCABULARY = 256, 128256

READING_LOGITS = {"_measure_tile", "_spread_of_tile", "_distribute", "_begin", "_tally", "_count_values", "_write", "_chain"}
KERNELS = {"_merge_tiles", "_merge_spreads", "_want_attention", "_decide", "_choose", "_choose_value", *READING_LOGITS}


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


def said_of(label):
    """Numbers in the row of the page that begins with this."""
    [numbers] = re.findall(rf"^\| {re.escape(label)} \| (.+) \|$", PAGE.read_text(), re.M)
    return [float(found) for number in numbers.split(" | ") if (found := re.sub("[^0-9.]", "", number))]


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_page_says_what_the_machine_code_says(found, name):
    # Of the steps that the checks compile, the first that has the kernel.
    code = next(code for code in found["codes"].values() if code["name"] == name)
    assert said_of(f"`{name}`") == [code["warps"], code["registers"], code["shared"], code["instructions"]]


def test_the_page_says_what_steps_cost():
    logits, tiles = ROWS * VOCABULARY * 4, -(-VOCABULARY // logits_metrics.TILE)
    group = logits_metrics.group_size(VOCABULARY)
    maxima = ROWS * tiles * (logits_metrics.TILE // group) * 4
    partial = ROWS * tiles * 4 * 4
    # A capacity of values, ids and weights, and the groups that are chosen: written and read.
    collected = 2 * ROWS * (3 * candidates._CAPACITIES[0] + maxima // ROWS // 4) * 4
    _state, _largest, tallies, counts, before = (
        one.numel() * one.itemsize for one in wide_filters.buffers(ROWS, VOCABULARY, "meta")
    )
    sought = 5 * tallies + 2 * (counts + before)  # zeros, and twice read and put back to zero
    for label, read, written, beside, kernels in (
        ("metrics", logits, 0, maxima + 2 * partial, ["_measure_tile"]),
        ("a `top_k` of 128", ROWS * 128 * group * 4, logits, maxima + collected, []),
        ("a `top_p`, no `top_k`", 4 * logits, logits, sought + 2 * maxima, ["_tally", "_tally", "_count_values", "_write"]),
        ("neither", 2 * logits, logits, 3 * tallies + maxima, ["_tally", "_write"]),
        # The largest logit, and what is gathered, which is written and read; then the row is excluded.
        ("llama.cpp's default chain", 2 * logits, logits, maxima + 2 * ROWS * launch._CAPACITY * (4 + 4), []),
    ):
        seconds = (read + written + beside) / BANDWIDTH
        want = [read / 1e6, written / 1e6, beside / 1e6, seconds * 1e3]
        # Of each kernel, a program for each tile; `test_the_page_says_what_the_machine_code_says` holds the table.
        cycles = sum(said_of(f"`{name}`")[0] * said_of(f"`{name}`")[3] / SCHEDULERS for name in kernels)
        want += [ROWS * tiles / MULTIPROCESSORS * cycles / CLOCK * 1e3] if kernels else []
        for number, one, error in zip(said_of(label), want, (0.05, 0.05, 0.05, 0.0005, 0.0005), strict=False):
            assert abs(number - one) <= error * 1.01, (label, want)
        assert len(said_of(label)) == len(want)


def test_the_page_says_what_a_whole_step_moves_at_least():
    logits = ROWS * VOCABULARY * 4 / 1e6
    metrics, filtered, chained = map(said_of, ("metrics", "a `top_k` of 128", "llama.cpp's default chain"))
    # Reads and writes of vLLM 0.32's V2: the copy (sampler.py:242), its temperature (gumbel.py), the first and the last
    # pass of topk_topp_triton.py, and the draw. A search that needs more passes only adds to them.
    whole = {
        "vLLM's own": ((1 + 1 + 2 + 1) * logits, (1 + 1 + 1) * logits, 0.0),
        "with entropix": ((1 + 1) * logits + metrics[0] + filtered[0], logits + filtered[1], metrics[2] + filtered[2]),
        "with that chain": ((1 + 1) * logits + metrics[0] + chained[0], logits + chained[1], metrics[2] + chained[2]),
    }
    times = []
    for label, megabytes in whole.items():
        times.append(sum(megabytes) * 1e6 / BANDWIDTH * 1e3)
        # Sums of two numbers that the page has rounded to 0.1, and rounds again.
        for number, one, error in zip(said_of(label), (*megabytes, times[-1]), (0.1, 0.1, 0.1, 0.0005), strict=True):
            assert abs(number - one) <= error * 1.01, (label, megabytes, times)
    assert f"That is {times[1] / times[0]:.2f} of vLLM's own step" in PAGE.read_text()
    assert f"and with that chain {times[2] / times[0]:.2f} of it" in PAGE.read_text()
    # The table of targets says the same.
    assert f"| sampler step, 256 rows, with V2's draw | ≤ 0.7 | {times[1] / times[0]:.2f} |" in PAGE.read_text()
    assert f"| llama.cpp's default chain, 256 rows | ≤ 1.0 | {times[2] / times[0]:.2f} |" in PAGE.read_text()
