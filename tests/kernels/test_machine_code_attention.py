"""What the machine code of the attention kernels says, compiled for three GPUs as a step launches them; it takes none."""

import re
from pathlib import Path

import pytest

from tests.kernels.test_triton import result_of
from tests.support.machine_code import SHARED
from vllm_entropix.kernels.triton_.attention.workspace import (
    PROGRAMS,
    WORKSPACE,
    programs_for_whole_rows,
    rows_together,
    workspace_size,
)

READING_KEYS = ("_attend", "_deviate_again", "_measure_whole")
KERNELS = {"_keep", "_find", "_plan", "_merge_splits", "_deviate", "_finish", *READING_KEYS}


@pytest.fixture(scope="module")
def found():
    return result_of("attention_code_checks", "v1")


@pytest.fixture(scope="module")
def codes(found):
    return found["codes"]


@pytest.fixture(scope="module", params=SHARED)
def of_gpu(request, codes):
    """What a block may use of shared memory, and the code: an A100's, an H100's, a B200's."""
    capability = request.param
    code = codes if capability == 90 else result_of("attention_code_checks", "v1", capability)["codes"]
    return SHARED[capability], code


def test_every_size_of_a_step_takes_the_same_code(found):
    # 1 to 1024 rows, 1 to 80 layers: no request waits for a compiler.
    assert found["variants"] == dict.fromkeys(KERNELS, 1)


def test_registers_and_shared_memory(of_gpu):
    shared, codes = of_gpu
    assert {code["name"] for code in codes.values()} == KERNELS
    for what, code in codes.items():
        assert code["registers"] <= 168, what
        assert code["stack"] == 0, f"{what} spills registers"
        # Two blocks on a multiprocessor at least: while one waits, the other works.
        assert code["shared"] <= shared // 2 - 1024, what
        assert code["registers"] * 32 * code["warps"] <= 65536 // 2, what


def test_keys_are_read_sixteen_bytes_at_a_time(of_gpu):
    for what, code in of_gpu[1].items():
        # These two read a flag of each row.
        assert len(code["narrow_loads"]) <= {"_plan": 8, "_measure_whole": 1}.get(code["name"], 0), what
        if code["name"] in READING_KEYS:
            assert code["wide_copies"] > 0, what


def test_keys_of_a_tile_are_copied_by_all_threads(codes):
    # 64 keys of 128 numbers by 128 threads: eight copies each, and a block number.
    attend = codes["llama, 1 ranks: _attend"]
    assert (attend["wide_copies"], attend["copies"]) == (64 * 128 * 2 // 16 // 128, 9)
    assert attend["registers"] <= 128


def test_scores_are_rounded_before_a_maximum_is_subtracted(codes):
    # The matrix product of bfloat16 is other instructions, and nothing divides in this loop.
    assert codes["llama, 1 ranks: _attend"]["fused"] == 0


def test_rows_are_added_up_in_the_same_order_by_all_kernels(codes):
    # The same numbers, laid out over the same threads: so the same bits, whether scores were kept or computed again.
    for what, again in codes.items():
        if again["name"] == "_deviate_again":
            [layout] = codes[what.replace("_deviate_again", "_deviate")]["layouts"]
            assert layout in again["layouts"], what
        if again["name"] == "_measure_whole":
            for name in ("_attend", "_merge_splits", "_deviate"):
                assert set(codes[what.replace("_measure_whole", name)]["layouts"]) <= set(again["layouts"]), (what, name)


def test_the_page_says_what_the_machine_code_says(codes):
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    for name in ("_attend", "_deviate", "_deviate_again", "_measure_whole"):
        code = codes[f"llama, 1 ranks: {name}"]
        [numbers] = re.findall(rf"^\| `{name}`[^|]* \| (.+) \|$", page, re.M)
        said = [int(number.replace(",", "")) for number in numbers.split(" | ")]
        assert said == [code["warps"], code["registers"], code["shared"], code["longest_loop"]], name


def test_all_layers_are_one_launch():
    for longest in (1000, 8000, 128_000):
        assert rows_together(32, 256, 32, longest, WORKSPACE) == 256
        assert workspace_size(32, 256, 32, longest) == WORKSPACE
    assert rows_together(80, 64, 64, 128_000, WORKSPACE) == 64
    # The scores of 64 contexts of 8192 positions find room.
    assert workspace_size(1, 64, 32, 8192) < WORKSPACE
    assert PROGRAMS == 3 * 132


def test_who_takes_whole_rows():
    # All layers of a whole batch; of long contexts scores of too few rows find room.
    for rows, longest, programs in ((256, 1024, 396), (64, 1024, 396), (256, 4096, 210), (256, 8192, 0), (16, 1024, 0)):
        assert programs_for_whole_rows(32, rows, 32, longest, WORKSPACE) == programs, (rows, longest)
    assert not programs_for_whole_rows(1, 256, 32, 8192, WORKSPACE)
