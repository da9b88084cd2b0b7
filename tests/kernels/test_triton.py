"""The Triton kernels of ``vllm_entropix.kernels``: in Triton's interpreter, as ``triton_checks`` says, and compiled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import runners
from vllm_entropix.kernels import numba_ as cpu
from vllm_entropix.kernels.backend import kernels_for

ROOT = Path(__file__).parents[2]
CHECKS = (
    "metrics_equal_float64",
    "spreads_equal_float64",
    "metrics_of_other_types",
    "metrics_of_strange_rows",
    "metrics_do_not_cancel",
    "metrics_do_not_depend_on_the_batch",
    "distributions_equal_the_filters",
    "ties_are_kept_by_lowest_id",
    "large_top_k",
    "wide_top_k",
    "wide_ties",
    "wide_ties_over_tiles",
    "wide_filters_of_every_kind",
    "wide_rows_do_not_depend_on_the_batch",
    "narrow_and_wide_rows_together",
    "strange_rows",
    "early_rows",
    "rows_do_not_depend_on_the_batch",
    "steps_in_reserved_memory",
    "metrics_of_random_strange_rows",
    "draws_of_random_strange_rows",
    "attention_layouts",
    "attention_types",
    "attention_shapes",
    "attention_lengths",
    "attention_windows",
    "attention_variants",
    "attention_padding",
    "attention_rows_that_are_not_wanted",
    "attention_without_room_in_the_scratch",
    "attention_of_whole_rows",
    "attention_rows_do_not_depend_on_the_batch",
    "attention_of_strange_keys",
    "a_layer_is_measured_by_them",
    "an_observer_launches_once_for_each_kind_of_layer",
    "an_observer_keeps_queries_and_measures_them",
    "attention_refuses_keys_that_are_not_plain",
    "heads_over_ranks",
    "heads_over_ranks_of_every_kind",
    "heads_over_ranks_in_parts",
    "the_sampler_decides_and_writes_by_them",
    "samplers_write_with_a_rule_and_without",
    "repetitions_equal_pytorch",
    "chains_equal_pytorch",
    "random_chains_equal_pytorch",
    "chains_read_rows_twice",
    "what_is_gathered_first_is_enough",
    "rows_of_chains_are_alone",
    "chains_of_a_batch_equal_pytorch",
    "decisions_equal_those_of_pytorch",
    "decisions_of_several_samplers",
    "a_step_takes_few_launches",
    "parts_of_a_step_are_alone",
    "rows_are_read_seldom",
)


def result_of(module, runner, *arguments):
    """What a module beside this one prints in a process for this runner."""
    ended = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=runners.environment(runner),
        capture_output=True,
        text=True,
        timeout=850,  # the interpreter takes two minutes on a quiet machine
        check=False,
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, ended.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def results():
    return result_of("triton_checks", "v2")


# All others are compiled by test_machine_code_attention.py and test_machine_code_rows.py, as steps launch them.
KERNELS = {"_measure_tile", "_merge_tiles", "_distribute", "_repetitions", "_chain"}


def test_kernels_compile_for_a_gpu():
    # For an H100: machine code is made without one.
    assert set(result_of("compile_checks", "v1")) == KERNELS


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is repaired for machines without a GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_kernel(results, name):
    assert tuple(results) == CHECKS
    assert results[name] is None, results[name]


def test_kernels_by_device(monkeypatch):
    from vllm_entropix.kernels import backend

    monkeypatch.setattr(backend, "_triton_available", lambda: True)
    assert kernels_for(torch.device("cpu")) == "numba"
    assert kernels_for(torch.device("cuda", 1)) == "triton"
    assert kernels_for(torch.device("meta")) is None


def test_one_switch_for_all_kernels(monkeypatch):
    from vllm_entropix.kernels import backend

    monkeypatch.setenv(cpu.SWITCH, "0")
    for available in (cpu.available, backend._triton_available):
        available.cache_clear()
    try:
        assert kernels_for(torch.device("cpu")) is None
        assert kernels_for(torch.device("cuda")) is None
    finally:
        for available in (cpu.available, backend._triton_available):
            available.cache_clear()
