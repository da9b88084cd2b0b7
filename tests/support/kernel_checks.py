"""Run in a process of its own: small kernels in the repaired interpreter, against torch.

Prints, as JSON in the last line, what went wrong in each check: null, or the end of a traceback.
"""

import json
import sys
import traceback
from unittest import mock

import torch
import triton
import triton.language as tl

BFLOAT16 = torch.bfloat16


def all_bfloat16():
    """Every bfloat16 there is."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BFLOAT16)


def difficult_float32():
    """Random bits, both neighbours of each tie between two bfloat16, the ties themselves, and numbers without exponent."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (3 * 2**16,), generator=generator)
    ties = all_bfloat16().view(torch.int16).long() << 16 | 0x8000
    small = torch.randint(0, 2**23, (2**16,), generator=generator)
    numbers = torch.cat([bits, ties, ties - 1, ties + 1, small]).to(torch.int32).view(torch.float32)
    return numbers[: len(numbers) // 1024 * 1024]


def assert_same(got, want):
    """Equal to the last bit, apart from which NaN is which."""
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    numbers = ~want.isnan()
    assert torch.equal(torch.signbit(got[numbers]), torch.signbit(want[numbers]))


def random(*shape, seed=0, dtype=BFLOAT16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def copy(source, target, n, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    values = tl.load(source + offsets, mask=inside).to(tl.float32)
    tl.store(target + offsets, values, mask=inside)


def bfloat16_to_float32():
    source = all_bfloat16()
    target = torch.empty(len(source))
    copy[(triton.cdiv(len(source), 4096),)](source, target, len(source), 4096)
    assert_same(target, source.float())


def float32_to_bfloat16():
    source = difficult_float32()
    target = torch.empty(len(source), dtype=BFLOAT16)
    copy[(triton.cdiv(len(source), 4096),)](source, target, len(source), 4096)
    assert_same(target, source.to(BFLOAT16))


@triton.jit
def cut(source, target, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def float32_to_bfloat16_toward_zero():
    source = difficult_float32()
    target = torch.empty(len(source), dtype=BFLOAT16)
    cut[(len(source) // 1024,)](source, target, 1024)
    want = (source.view(torch.int32) >> 16).to(torch.int16).view(BFLOAT16)
    assert_same(target, torch.where(source.isnan(), torch.nan, want))


@triton.jit
def cast(source, target, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets))


def bfloat16_to_and_from_other_types():
    for other in (torch.float16, torch.float64, torch.int32, torch.int64):
        for source_type, target_type in ((BFLOAT16, other), (other, BFLOAT16)):
            source = (random(256) * 100).to(source_type)
            target = torch.empty(256, dtype=target_type)
            cast[(1,)](source, target, 256)
            assert torch.equal(target, source.to(target_type)), (source_type, target_type)


@triton.jit
def arithmetic(left, right, target, factor, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, BLOCK)
    x = tl.load(left + offsets)
    y = tl.load(right + offsets)
    tl.store(target + offsets, x + y)
    tl.store(target + BLOCK + offsets, x - y)
    tl.store(target + 2 * BLOCK + offsets, x * y)
    tl.store(target + 3 * BLOCK + offsets, x / y)
    tl.store(target + 4 * BLOCK + offsets, -x)
    tl.store(target + 5 * BLOCK + offsets, tl.abs(x))
    tl.store(target + 6 * BLOCK + offsets, tl.maximum(x, y))
    tl.store(target + 7 * BLOCK + offsets, tl.clamp(x, -0.5, 0.5))
    tl.store(target + 8 * BLOCK + offsets, tl.where(x < y, x, y))
    tl.store(target + 9 * BLOCK + offsets, (x < y).to(tl.float32))
    tl.store(target + 10 * BLOCK + offsets, tl.fma(x, y, x))
    tl.store(target + 11 * BLOCK + offsets, x * 1.1)
    tl.store(target + 12 * BLOCK + offsets, x * factor)
    tl.store(target + 13 * BLOCK + offsets, tl.clamp(x, -0.5, 0.5, propagate_nan=tl.PropagateNan.ALL))


def bfloat16_arithmetic():
    x, y = random(512), random(512, seed=1)
    target = torch.empty(14, 512, dtype=BFLOAT16)
    arithmetic[(1,)](x, y, target, 1.1, 512)
    want = [
        *(x + y, x - y, x * y, x / y, -x, x.abs(), torch.maximum(x, y), x.clamp(-0.5, 0.5)),
        *(torch.minimum(x, y), (x < y).to(BFLOAT16), (x.double() * y.double() + x.double()).to(BFLOAT16)),
        # A number in the source takes the tensor's type, an argument is float32.
        *(x * torch.tensor(1.1, dtype=BFLOAT16), (x.float() * 1.1).to(BFLOAT16), x.clamp(-0.5, 0.5)),
    ]
    for row, (got, expected) in enumerate(zip(target, want, strict=True)):
        assert torch.equal(got, expected), row


@triton.jit
def product(left, right, target, BLOCK: tl.constexpr):  # noqa: N803
    rows = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    x = tl.load(left + rows * BLOCK + columns)
    y = tl.load(right + rows * BLOCK + columns)
    tl.store(target + rows * BLOCK + columns, tl.dot(x, y))


def bfloat16_dot():
    x, y = random(32, 32), random(32, 32, seed=1)
    target = torch.empty(32, 32)
    product[(1,)](x, y, target, 32)
    torch.testing.assert_close(target, x.float() @ y.float(), rtol=1e-5, atol=1e-5)


@triton.jit
def reduce_rows(source, sums, largest, smallest, where, running, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    rows = tl.arange(0, ROWS)
    offsets = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(source + offsets)
    tl.store(sums + rows, tl.sum(x, axis=1))
    tl.store(largest + rows, tl.max(x, axis=1))
    tl.store(smallest + rows, tl.min(x, axis=1))
    tl.store(where + rows, tl.argmax(x, axis=1))
    tl.store(running + offsets, tl.cumsum(x, axis=1))


def check_reductions(dtype, tolerance):
    x = random(4, 64, dtype=dtype) - 3  # a maximum below zero too
    sums, largest, smallest = (torch.empty(4, dtype=dtype) for _ in range(3))
    where, running = torch.empty(4, dtype=torch.int32), torch.empty(4, 64, dtype=dtype)
    reduce_rows[(1,)](x, sums, largest, smallest, where, running, 4, 64)
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(smallest, x.amin(1))
    assert torch.equal(where.long(), x.argmax(1))
    torch.testing.assert_close(sums.double(), x.double().sum(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(running.double(), x.double().cumsum(1), rtol=tolerance, atol=tolerance)


def bfloat16_reductions():
    check_reductions(BFLOAT16, 2**-8)


def float32_reductions():
    check_reductions(torch.float32, 1e-5)


@triton.jit
def masked(flags, source, target, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, BLOCK)
    # One comparison for the whole block, and a flag from memory.
    mine = tl.program_id(0) == 1
    flag = tl.load(flags + offsets)
    values = tl.load(source + offsets, mask=mine, other=-1.0)
    tl.store(target + tl.program_id(0) * BLOCK + offsets, values, mask=flag)
    tl.store(target + 2 * BLOCK + offsets, values, mask=mine & flag & (offsets > 3))


def masks():
    source, flags = random(16, dtype=torch.float32), torch.arange(16) % 2 == 0
    target = torch.zeros(3, 16)
    masked[(2,)](flags, source, target, 16)
    assert torch.equal(target[0], torch.where(flags, -1.0, 0.0))
    assert torch.equal(target[1], torch.where(flags, source, 0.0))
    assert torch.equal(target[2], torch.where(flags & (torch.arange(16) > 3), source, 0.0))


@triton.jit
def loops(source, target, n, long, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, n, BLOCK):
        total += tl.load(source + (start * 1).to(tl.int64) + offsets)
    for i in tl.range(2, num_stages=2):
        total += i.to(tl.float32)
    for i in tl.range(long, long + 1):
        # Beyond 32 bits, unless the variable has the type of its bounds.
        total += (i * 2 - long * 2).to(tl.float32)
    for i in tl.static_range(3):
        total += i
    tl.store(target + offsets, total)


def loop_variables():
    source, target = random(4, 16, dtype=torch.float32), torch.empty(16)
    loops[(1,)](source, target, 64, 2**31, 16)
    torch.testing.assert_close(target, source.sum(0) + 1 + 3)


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def sum_and_largest(x_sum, x_max, y_sum, y_max):
    return x_sum + y_sum, tl.maximum(x_max, y_max)


@triton.jit
def combined(source, scanned, reduced, counters, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, BLOCK)
    x = tl.load(source + offsets)
    tl.store(scanned + offsets, tl.associative_scan(x, 0, larger))
    total, most = tl.reduce((x, x), 0, sum_and_largest)
    tl.store(reduced, total)
    tl.store(reduced + 1, most)
    tl.atomic_add(counters + offsets % 4, 1, mask=offsets < BLOCK // 2)
    tl.atomic_max(counters + 4 + offsets * 0, offsets)


def own_combinations_and_atomics():
    for dtype in (torch.float32, BFLOAT16):
        x = random(64, dtype=dtype).abs()
        scanned, reduced, counters = torch.empty_like(x), torch.empty(2, dtype=dtype), torch.zeros(5, dtype=torch.int32)
        combined[(2,)](x, scanned, reduced, counters, 64)
        assert torch.equal(scanned, x.cummax(0).values)
        torch.testing.assert_close(reduced[0].float(), x.float().sum(), rtol=0.05 if dtype == BFLOAT16 else 1e-5, atol=0)
        assert reduced[1] == x.max()
        assert counters.tolist() == [16, 16, 16, 16, 63]


@triton.autotune(configs=[triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["n"])
@triton.jit
def tuned(source, target, n, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets, mask=offsets < n), mask=offsets < n)


def autotuned_kernels():
    source, target = random(64), torch.empty(64, dtype=BFLOAT16)
    tuned[lambda meta: (triton.cdiv(64, meta["BLOCK"]),)](source, target, 64)
    assert torch.equal(source, target)


@triton.jit
def add_one(counts, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, BLOCK)
    tl.store(counts + offsets, tl.load(counts + offsets) + 1)


def launches_do_only_what_they_must():
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    counts = torch.zeros(16, dtype=torch.int32)
    add_one[(1,)](counts, 16)
    unwanted = AssertionError("done at every launch")
    with (
        mock.patch.object(torch.UntypedStorage, "cpu", side_effect=unwanted),
        mock.patch.object(torch.UntypedStorage, "copy_", side_effect=unwanted),
        mock.patch.object(interpreter, "_patch_builtin", side_effect=unwanted),
        mock.patch.object(TritonSemantic, "device_assert", side_effect=unwanted),
    ):
        add_one[(1,)](counts, 16)
    assert counts.tolist() == [2] * 16


def top_k_top_p_by_torch():
    from triton.runtime.interpreter import InterpretedFunction
    from vllm.v1.sample.ops import topk_topp_sampler

    logits, k, p = random(4, 512, dtype=torch.float32), torch.tensor([5, 512, 40, 1]), torch.tensor([1.0, 0.5, 0.9, 1.0])
    want = topk_topp_sampler.apply_top_k_top_p_pytorch(logits.clone(), k, p, allow_cpu_sync=True)
    with mock.patch.object(InterpretedFunction, "run", side_effect=AssertionError("a kernel is launched")):
        assert torch.equal(topk_topp_sampler.apply_top_k_top_p(logits.clone(), k, p), want)


CHECKS = (
    bfloat16_to_float32,
    float32_to_bfloat16,
    float32_to_bfloat16_toward_zero,
    bfloat16_to_and_from_other_types,
    bfloat16_arithmetic,
    bfloat16_dot,
    bfloat16_reductions,
    float32_reductions,
    masks,
    loop_variables,
    own_combinations_and_atomics,
    autotuned_kernels,
    launches_do_only_what_they_must,
    top_k_top_p_by_torch,
)


def main():
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()[-2000:]
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
