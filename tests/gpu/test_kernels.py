"""The checks of ``tests/kernels/triton_checks.py`` with compiled kernels, and what only a GPU shows."""

import pytest
import torch

pytest.importorskip("triton")

# What needs float8 on the GPU itself, or a sampler on the CPU, stands apart.
NOT_HERE = {"attention_types", "the_sampler_decides_and_writes_by_them", "a_step_takes_few_launches", "rows_are_read_seldom"}


def names():
    from tests.kernels.test_triton import CHECKS

    return [name for name in CHECKS if name not in NOT_HERE]


@pytest.fixture
def checks():
    from tests.kernels import triton_checks

    torch.manual_seed(0)
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield triton_checks
    torch.set_default_device(before)


@pytest.mark.parametrize("name", names())
def test_kernel(checks, name):
    {check.__name__: check for check in checks.CHECKS}[name]()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_types_of_keys(checks, dtype):
    if dtype.itemsize == 1 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    checks.attention_case(dtype=dtype, lengths=(1, 17, 64, 65, 1000), tolerance=1e-3)


def sampler_step(logits, sampled):
    """One step of the batch sampler; the rows that it wrote."""
    from vllm_entropix import EntropixConfig
    from vllm_entropix.rows.batch import BatchSampler
    from vllm_entropix.rows.rows import Rows
    from vllm_entropix.rows.table import Sequence

    config, rows, device = EntropixConfig(), len(logits), logits.device
    batch = BatchSampler(config, rows, None, device)
    numbers = [value for _, value in config.numbers()]
    for row in range(rows):
        batch.add(
            str(row), Sequence(numbers, sampled=bool(sampled[row]), traced=True, allow_clarification=True, prompt_length=1)
        )
    batch.sequences.flush()
    slots = batch.sequences.slots_of(map(str, range(rows)), rows)
    described = Rows(
        slots=torch.from_numpy(slots).to(device),
        host_slots=slots,
        positions=torch.full((rows,), 10, device=device),
        input_ids=torch.zeros(rows, dtype=torch.int64, device=device),
        valid=torch.ones(rows, dtype=torch.bool, device=device),
        batch=torch.arange(rows, device=device),
    )
    return lambda work: batch.apply(work, described, None)


def test_steps_equal_those_of_the_cpu():
    from tests.kernels.test_cpu import assert_records_close, mixed_logits

    logits = mixed_logits(24, 50_000, 1)
    sampled = [row % 5 != 3 for row in range(24)]
    on_cpu, on_gpu = logits.clone(), logits.cuda()
    want = sampler_step(on_cpu, sampled)(on_cpu)
    got = sampler_step(on_gpu, sampled)(on_gpu)
    assert_records_close(got.cpu(), want, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(on_gpu.cpu().softmax(-1), on_cpu.softmax(-1), rtol=1e-3, atol=1e-6)


def test_a_step_does_not_wait_for_the_device():
    from tests.kernels.test_cpu import mixed_logits

    logits = mixed_logits(24, 50_000, 1).cuda()
    step = sampler_step(logits, [True] * 24)
    step(logits.clone())  # compiles
    work = logits.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(work)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_statistics_in_a_cuda_graph(checks):
    layers, requests, lengths, config, want = checks.attention_case(lengths=(130, 5, 70, 200), layers=2)
    wanted = torch.ones(4, dtype=torch.bool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = checks.by_kernels(layers, requests, lengths, wanted, config)
    shorter = torch.tensor([3, 64, 65, 100])
    lengths.copy_(shorter)
    graph.replay()
    again = checks.by_kernels(layers, requests, shorter, wanted, config)
    assert torch.equal(captured, again)
    assert not torch.equal(captured, want)
