"""CPU kernels against the PyTorch functions that they equal."""

import math
import subprocess
import sys
import threading
import time

import numba
import numpy as np
import pytest
import torch

from tests.support.strange_rows import assert_same_attention
from vllm_entropix import EntropixConfig
from vllm_entropix.attention import LayerAttention
from vllm_entropix.attention.paged_keys import CpuAmxKeys, CpuVectorKeys
from vllm_entropix.attention.statistics import measure_layer, measure_layer_in_pytorch
from vllm_entropix.distribution.backend import Backend
from vllm_entropix.distribution.constants import Constants
from vllm_entropix.distribution.history import repetitions, repetitions_by_torch
from vllm_entropix.kernels import numba_ as cpu
from vllm_entropix.kernels.numba_ import threads
from vllm_entropix.kernels.numba_.elementary import exponential, largest
from vllm_entropix.records.fields import names
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import Sequence
from vllm_entropix.sampling import AttentionStatistics, EntropixSampler

METRICS = ("attention_entropy", "attention_varentropy", "agreement", "interaction_strength")


def test_kernels_are_there():
    assert cpu.available()


def mixed_logits(rows, vocabulary, seed):
    """Rows of every regime: one token dominant, two-level forks, flat, mist, Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator)
    for row in range(rows):
        kind = row % 6
        if kind == 0:
            logits[row, row % vocabulary] += 40
        elif kind == 1:
            logits[row] *= 1e-3
        elif kind == 2:
            logits[row] *= 0.01
            logits[row, row % vocabulary] += 8
        elif kind == 3:
            logits[row] *= 0.05
            logits[row, :8] += 6
        elif kind == 4:
            logits[row] = (logits[row] * 8).round() / 2  # many ties
        else:
            logits[row] *= 2.5
    return logits


def some_statistics(rows, seed, measured=True):
    generator = torch.Generator().manual_seed(seed)
    return AttentionStatistics(
        torch.rand(rows, generator=generator) * 8,
        torch.rand(rows, generator=generator) * 2,
        torch.rand(rows, generator=generator) * 0.3,
        torch.rand(rows, generator=generator) * 6,
        None if measured else torch.rand(rows, generator=generator) < 0.5,
    )


def constants_of(rows):
    """Rows of the published presets, and of one that moves ADAPTIVE around the base temperature, in turn."""
    presets = [EntropixConfig.preset(name) for name in ("jax-2024-10", "torch-2024-10")]
    presets.append(EntropixConfig.preset(adaptive={"temperature_offset": 0.5, "temperature_logits": 0.1}))
    values = torch.tensor([[value for _, value in presets[row % 3].numbers()] for row in range(rows)])
    return Constants(values, Constants.from_config(presets[0], torch.float32, "cpu").columns)


@pytest.mark.parametrize("measured", [True, False, None])
@pytest.mark.parametrize("rows", [1, 7, 60])
def test_decisions(rows, measured):
    logits = mixed_logits(rows, 3000, rows)
    statistics = None if measured is None else some_statistics(rows, 1, measured)
    constants = constants_of(rows)
    config = EntropixConfig()
    got = EntropixSampler(config, kernels=True).decide(logits, statistics, constants)
    want = EntropixSampler(config).decide(logits, statistics, constants)
    assert torch.equal(got.regime, want.regime)
    if rows > 6:
        assert len(set(want.regime.tolist())) >= 4
    for name in ("temperature", "top_p", "min_p", "confidence"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(got.top_k, want.top_k)
    assert torch.equal(got.parameters.samples, want.parameters.samples)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_metrics_give_base_parameters(bad):
    logits = mixed_logits(12, 500, 3)
    logits[5, 3] = bad
    statistics = some_statistics(12, 2)
    statistics.attention_entropy[7] = bad
    constants = constants_of(12)
    got = EntropixSampler(EntropixConfig(), kernels=True).decide(logits, statistics, constants)
    want = EntropixSampler(EntropixConfig()).decide(logits, statistics, constants)
    assert torch.equal(got.regime, want.regime)
    for name in ("temperature", "top_p", "min_p", "top_k"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)


def apply(logits, kernels, sampled, clarification=None, base=None, fidelity="corrected", measure=None):
    config = EntropixConfig.from_dict({"base": base or {}, "fidelity": fidelity})
    rows = len(logits)
    batch = BatchSampler(config, rows, clarification, "cpu")
    if not kernels:
        batch.backend = Backend("cpu")
    numbers = [value for _, value in config.numbers()]
    for row in range(rows):
        batch.add(
            str(row), Sequence(numbers, sampled=bool(sampled[row]), traced=True, allow_clarification=True, prompt_length=1)
        )
    slots = batch.sequences.slots_of(map(str, range(rows)), rows)
    described = Rows(
        slots=torch.from_numpy(slots),
        host_slots=slots,
        positions=torch.full((rows,), 10),
        input_ids=torch.zeros(rows, dtype=torch.int64),
        valid=torch.ones(rows, dtype=torch.bool),
        batch=torch.arange(rows),
    )
    logits = logits.clone()
    records = batch.apply(logits, described, measure)
    return logits, records


def assert_records_close(got, want, logits, rtol=1e-5, atol=1e-6):
    """Equal but for rounding, and for which of equal logits is told as an alternative."""
    first = 1 + len(names())
    count = (got.shape[1] - first) // 2
    ids = slice(first, first + count)
    assert torch.equal(logits.gather(1, got[:, ids].long()), logits.gather(1, want[:, ids].long()))
    keep = [column for column in range(got.shape[1]) if not first <= column < first + count]
    torch.testing.assert_close(got[:, keep], want[:, keep], rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 40, 1000, 40000])
@pytest.mark.parametrize("base", [{}, {"top_k": 300, "top_p": 0.987, "min_p": 0.0}, {"top_k": 1}, {"top_p": 1.0, "min_p": 0.0}])
def test_distributions(vocabulary, base):
    logits = mixed_logits(18, vocabulary, vocabulary)
    if vocabulary > 4:
        logits[7, : vocabulary // 2] = -torch.inf
        logits[8, 1:] = -torch.inf
        logits[9] = 1.5  # all equal
    sampled = np.array([row % 5 != 3 for row in range(18)])
    got, got_records = apply(logits, True, sampled, base=base)
    want, want_records = apply(logits, False, sampled, base=base)
    assert_records_close(got_records, want_records, logits)
    assert torch.equal(got[~torch.from_numpy(sampled)], logits[~torch.from_numpy(sampled)])
    torch.testing.assert_close(got.softmax(-1), want.softmax(-1), rtol=1e-4, atol=1e-7)
    # The same tokens are kept, but for those that rounding puts on either side of top_p.
    differ = torch.isinf(got) != torch.isinf(want)
    assert (want.softmax(-1) + got.softmax(-1))[differ].sum() < 1e-5


def test_forced_rows():
    logits = mixed_logits(12, 5000, 5)
    sampled = np.ones(12, dtype=bool)
    got, records = apply(logits, True, sampled, clarification=(17, 18))
    want, expected = apply(logits, False, sampled, clarification=(17, 18))
    assert_records_close(records, expected, logits)
    forced = records[:, 1 + names().index("forced")] > 0
    assert forced.any()
    assert torch.equal(got[forced], want[forced])
    assert (got[forced].argmax(-1) == 17).all()


def paged(layout, dtype, kv_heads, head_dim, size, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(blocks, kv_heads, size, 2 * head_dim, generator=generator).to(dtype)
    return (CpuAmxKeys if layout == "amx" else CpuVectorKeys)(cache)


@pytest.mark.parametrize(
    ("layout", "dtype"), [("vec", torch.float32), ("vec", torch.bfloat16), ("vec", torch.float16), ("amx", torch.bfloat16)]
)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("fidelity", ["corrected", "original"])
def test_attention(layout, dtype, window, fidelity):
    config = EntropixConfig.preset("jax-2024-10", fidelity=fidelity)
    keys = paged(layout, dtype, kv_heads=2, head_dim=32, size=32, blocks=40, seed=1)
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([1, 31, 32, 33, 64, 65, 100, 128, 5])
    queries = torch.randn(len(lengths), 8, 32, generator=generator) * 2
    table = torch.randint(1, 40, (len(lengths), 4), generator=generator, dtype=torch.int32)
    layer = LayerAttention(keys, scale=32**-0.5, window=window)
    got = measure_layer(layer, queries, table, lengths, config)
    want = measure_layer_in_pytorch(layer, queries, table, lengths, config)
    for metric in METRICS:
        torch.testing.assert_close(getattr(got, metric), getattr(want, metric), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("layout", "dtype"), [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 80), (4, 2, 32), (14, 2, 64), (8, 1, 112), (32, 8, 128)])
@pytest.mark.parametrize("window", [None, 700])
def test_attention_of_head_groups(layout, dtype, heads, kv_heads, head_dim, window):
    """Every way of dealing a group's heads, rows of several blocks and of more positions than are added at a time."""
    keys = paged(layout, dtype, kv_heads, head_dim, size=128, blocks=24, seed=5)
    generator = torch.Generator().manual_seed(6)
    lengths = torch.tensor([1100, 513, 15, 16, 17, 1])
    queries = torch.randn(len(lengths), heads, head_dim, generator=generator) * 2
    table = torch.randint(0, 24, (len(lengths), 9), generator=generator, dtype=torch.int32)
    layer, config = LayerAttention(keys, scale=head_dim**-0.5, window=window), EntropixConfig()
    got = measure_layer(layer, queries, table, lengths, config)
    want = measure_layer_in_pytorch(layer, queries, table, lengths, config)
    for metric in METRICS:
        torch.testing.assert_close(getattr(got, metric), getattr(want, metric), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("layout", "dtype"), [("vec", torch.float32), ("amx", torch.bfloat16)])
def test_attention_sees_only_its_positions(layout, dtype):
    """What lies before the window and beyond the row's last position doesn't matter; a NaN among its keys makes it all NaN."""
    size, head_dim, length, window = 32, 32, 75, 40
    generator = torch.Generator().manual_seed(7)
    numbers = torch.randn(3 * size, head_dim, generator=generator)
    queries = torch.randn(1, 4, head_dim, generator=generator)

    def measured(numbers):
        blocks = numbers.view(3, size, head_dim).to(dtype)
        tiles = blocks.view(3, size // 16, 16, head_dim // 2, 2).transpose(2, 3)
        cache = torch.zeros(3, 1, size, 2 * head_dim, dtype=dtype)
        cache.view(3, -1)[:, : size * head_dim] = (tiles if layout == "amx" else blocks.transpose(1, 2)).reshape(3, -1)
        layer = LayerAttention((CpuAmxKeys if layout == "amx" else CpuVectorKeys)(cache), scale=0.2, window=window)
        table = torch.arange(3, dtype=torch.int32).view(1, 3)
        statistics = measure_layer(layer, queries, table, torch.tensor([length]), EntropixConfig())
        return torch.cat([getattr(statistics, metric) for metric in METRICS])

    want = measured(numbers)
    assert want.isfinite().all()
    around = numbers.clone()
    around[length:] = around[: length - window] = torch.nan
    assert torch.equal(measured(around), want)
    around[length - window] = torch.nan
    assert measured(around).isnan().all()


@pytest.mark.parametrize(("layout", "dtype"), [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)])
@pytest.mark.parametrize("rule", ["heads", "heads-unbiased", "zero"])
@pytest.mark.parametrize("number", [torch.nan, -torch.nan, torch.inf, -torch.inf, 1e30, 1e-45])
def test_attention_of_strange_numbers(layout, dtype, rule, number):
    """NaN, infinities, huge and denormal numbers among queries or keys: what isn't a finite number is so in both."""
    config = EntropixConfig.from_dict(
        {"fidelity": "original", "original": {"attention_varentropy": rule, "padded_positions": 60}}
    )
    lengths = torch.tensor([1, 33, 64, 90])
    table = torch.tensor([[1, 2, 3], [3, 4, 5], [2, 3, 4], [5, 6, 7]], dtype=torch.int32)
    for among in ("keys", "queries"):
        keys = paged(layout, dtype, kv_heads=2, head_dim=32, size=32, blocks=8, seed=1)
        queries = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(2))
        (keys.cache[2, 1, 3] if among == "keys" else queries[1, 0])[5] = number
        layer = LayerAttention(keys, scale=0.2)
        for config_of_case in (config, EntropixConfig()):
            got = measure_layer(layer, queries, table, lengths, config_of_case)
            want = measure_layer_in_pytorch(layer, queries, table, lengths, config_of_case)
            for metric in METRICS:
                assert_same_attention(getattr(got, metric), getattr(want, metric))


def test_attention_of_no_rows():
    layer = LayerAttention(paged("vec", torch.bfloat16, 1, 32, 32, 2, seed=8), scale=1.0)
    got = measure_layer(
        layer, torch.empty(0, 2, 32), torch.empty(0, 1, dtype=torch.int32), torch.empty(0).long(), EntropixConfig()
    )
    assert got.attention_entropy.shape == (0,)


def test_attention_rows_do_not_depend_on_the_others_nor_on_threads(monkeypatch):
    config = EntropixConfig()
    keys = paged("vec", torch.float32, 2, 64, 32, 64, seed=3)
    lengths = torch.tensor([700, 3, 350, 512, 33, 900])
    queries = torch.randn(6, 4, 64, generator=torch.Generator().manual_seed(4))
    table = torch.randint(0, 64, (6, 32), dtype=torch.int32)
    layer = LayerAttention(keys, scale=0.125)
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    shared = measure_layer(layer, queries, table, lengths, config)
    for workers in (1, 2, 3):
        monkeypatch.setattr(threads.torch, "get_num_threads", lambda workers=workers: workers)
        for row in range(6):
            alone = measure_layer(layer, queries[row : row + 1], table[row : row + 1], lengths[row : row + 1], config)
            for metric in METRICS:
                assert getattr(alone, metric)[0] == getattr(shared, metric)[row]


@pytest.mark.parametrize("costs", [[1] * 40, [1, 100, 0, 5, 1], [0, 0, 9], [100, 1], [0, 0], [7], []])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_row_is_done_once(monkeypatch, costs, workers):
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: workers)
    done = []
    threads.share_rows(np.array(costs, dtype=np.int64), lambda first, last: done.extend(range(first, last)))
    assert sorted(done) == list(range(len(costs)))


def test_an_error_of_a_share_is_raised(monkeypatch):
    monkeypatch.setattr(threads, "WORTH_SHARING", 1)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    begun = threading.Barrier(2, timeout=60)

    def work(first, last):
        begun.wait()  # until both threads are at it
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("of a helper")

    with pytest.raises(ValueError, match="of a helper"):
        threads.share_rows(np.ones(2, dtype=np.int64), work)


@numba.njit
def each(numbers, results):
    for i in range(len(numbers)):
        results[i] = exponential(numbers[i])


def test_exponential():
    numbers = np.concatenate([np.linspace(-87, 0, 1 << 18), -np.logspace(-30, 1.9, 1 << 16), [0.0, -0.0]]).astype(np.float32)
    results = np.empty_like(numbers)
    each(numbers, results)
    want = np.array([math.exp(number) for number in numbers.tolist()])
    # Units in the last place of the float32 nearest to the truth.
    assert (np.abs(results - want) / np.spacing(want.astype(np.float32))).max() < 2
    numbers = np.array([0.0, -88.0, -1e30, -np.inf, np.nan], dtype=np.float32)
    results = np.empty_like(numbers)
    each(numbers, results)
    assert results[0] == 1
    assert (results[1:4] == results[1]).all()
    assert 0 < results[1] < 2e-38
    assert np.isnan(results[4])


@pytest.mark.parametrize("count", [1, 2, 15, 1000])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest(count, sign):
    numbers = sign * np.abs(np.random.default_rng(count).normal(size=(50, count))).astype(np.float32)
    numbers[0, 0] = 0.0
    numbers[1, 0] = np.inf
    numbers[2] = -np.inf
    for row in numbers:
        assert largest(row) == row.max()


NO_FOLDER = """
import numba.core.caching as caching
caching.FunctionCache._impl_class._locator_classes = []
import numpy as np
from vllm_entropix.kernels.numba_ import metrics
from vllm_entropix.kernels.numba_.machine_code import kept_on_disk
assert not kept_on_disk()
entropy, varentropy, log_normaliser = np.empty((3, 1), dtype=np.float32)
metrics.metrics_of_rows(np.zeros((1, 8), dtype=np.float32), entropy, varentropy, log_normaliser, 0, 1)
assert entropy[0] == 3.0, entropy
"""


def test_kernels_run_where_nothing_can_be_kept():
    """As in a container whose package and home can't be written to."""
    ended = subprocess.run([sys.executable, "-c", NO_FOLDER], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


# --- repetitions ------------------------------------------------------------------------------------------------------


def repeating_texts():
    """Texts of few tokens, so that they repeat, of which some begin late, and lengths that are enough."""
    rng = np.random.default_rng(5)
    for width in (2, 3, 7, 40, 300):
        for tokens in (1, 2, 5):
            text = torch.from_numpy(rng.integers(0, tokens, size=(4, width)))
            for row in range(3):
                text[row, : int(rng.integers(0, width + 1))] = -1
            yield text, torch.from_numpy(rng.integers(0, 2 * width, size=(4, 1)))


def test_repetitions_equal_those_of_pytorch_and_of_comparing():
    for tokens, enough in repeating_texts():
        found = repetitions(tokens, enough)
        assert torch.equal(found, repetitions_by_torch(tokens, enough))
        for row, most, lengths in zip(tokens.tolist(), enough.flatten().tolist(), found.tolist(), strict=True):
            text = [token for token in row if token >= 0]
            for place in range(1, len(text)):
                end, length = text[:place], 0
                while length < min(place, most) and end[-1 - length] == text[-1 - length]:
                    length += 1
                assert lengths[len(row) - len(text) + place - 1] == length


def test_the_worst_text_costs_no_more_than_another():
    """One token 4096 times, 64 rows: each place repeats all before it. PyTorch compares them one after the other."""
    tokens, enough = torch.zeros(64, 4096, dtype=torch.int64), torch.full((64, 1), 4096)
    repetitions(tokens, enough)
    before = time.process_time()
    repetitions(tokens, enough)
    assert time.process_time() - before < 64 * 0.3e-3
