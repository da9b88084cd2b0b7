"""Triton kernels against the PyTorch functions that they equal, and against float64, on PyTorch's default device.

Run by ``test_triton.py`` in a process of its own, since Triton has to be told of its interpreter before it is imported, and by
``tests/gpu`` as compiled kernels.
"""

import dataclasses
import json
import math
import sys
import traceback
import types
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import chain_checks, decision_checks
from tests.kernels.test_cpu import apply, mixed_logits, repeating_texts
from tests.support import strange_rows as strange
from tests.support.ranks import Meeting
from vllm_entropix import EntropixConfig
from vllm_entropix.attention import AttentionObserver, LayerAttention, launches, ranks, statistics
from vllm_entropix.attention import observer as observer_module
from vllm_entropix.attention.launches import measure_layers
from vllm_entropix.attention.layers import LayerRows
from vllm_entropix.attention.paged_keys import CpuVectorKeys, PlainKeys
from vllm_entropix.attention.statistics import measure_layer, measure_layer_in_pytorch
from vllm_entropix.distribution import backend, filters
from vllm_entropix.distribution import statistics as statistics_of_logits
from vllm_entropix.distribution.best_of_n import best_of_n
from vllm_entropix.distribution.history import repetitions_by_torch
from vllm_entropix.kernels.triton_ import candidates, logits_metrics, repetitions, wide_filters
from vllm_entropix.kernels.triton_.attention import shares, workspace
from vllm_entropix.kernels.triton_.attention import statistics as attention_statistics
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import Sequence
from vllm_entropix.sampling import LogitsMetrics, Parameters

# The interpreter takes its time.
PROPERTY = settings(derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Around the edges of groups and of a tile.
VOCABULARIES = (1, 2, 17, 63, 64, 65, 1000, 4095, 4096, 4097)
METRICS = ("attention_entropy", "attention_varentropy", "agreement", "interaction_strength")


def random(*shape, seed=0):
    # The same numbers on every device.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(torch.get_default_device())


def mixed(rows, vocabulary, seed):
    with torch.device("cpu"):
        logits = mixed_logits(rows, vocabulary, seed)
    return logits.to(torch.get_default_device())


# --- logits metrics ---------------------------------------------------------------------------------------------------


def metrics_of(logits):
    return torch.stack(logits_metrics.logits_metrics(logits)[:3])


def reference_of(logits):
    exact = LogitsMetrics.from_logits(logits.double())
    return torch.stack((exact.entropy, exact.varentropy, exact.log_normaliser))


def metrics_equal_float64():
    for vocabulary in (1, 2, 100, 4095, 4096, 4097, 9000):
        logits = mixed(12, vocabulary, vocabulary)
        torch.testing.assert_close(metrics_of(logits).double(), reference_of(logits), rtol=2e-5, atol=2e-5)
        twin = LogitsMetrics.from_logits(logits)
        want = torch.stack((twin.entropy, twin.varentropy, twin.log_normaliser))
        torch.testing.assert_close(metrics_of(logits), want, rtol=2e-5, atol=2e-5)


def spreads_equal_float64():
    for vocabulary in (1, 2, 100, 4095, 4096, 4097, 9000):
        logits = mixed(12, vocabulary, vocabulary)
        logits[1] = 1e4 + logits[1] / 100  # E[x²] - E[x]² would be off
        logits[2], logits[3, ::2], logits[4, 0], logits[5, -1] = -torch.inf, -torch.inf, torch.nan, torch.inf
        logits[6] = 0.1  # sums of which are rounded
        found = backend.TritonBackend(logits.device).spread(logits)
        torch.testing.assert_close(found.double(), statistics_of_logits.spread(logits.double()), rtol=2e-5, atol=2e-5)
        assert found[6] == 0
        for order in (torch.tensor([3]), torch.randperm(12)):
            assert torch.equal(backend.TritonBackend(logits.device).spread(logits[order]), found[order])


def metrics_of_other_types():
    for dtype in (torch.bfloat16, torch.float16):
        logits = mixed(6, 5000, 1).to(dtype)
        torch.testing.assert_close(metrics_of(logits).double(), reference_of(logits), rtol=2e-5, atol=2e-5)


def metrics_of_strange_rows():
    logits = mixed(8, 9000, 2)
    logits[0, :5000] = -torch.inf  # a whole tile of it
    logits[1, 1:] = -torch.inf
    logits[2] = -torch.inf
    logits[3, 7000] = torch.inf
    logits[4, 10] = torch.nan
    logits[5] = torch.nan
    logits[6] = 3e38
    got, want = metrics_of(logits), reference_of(logits)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert got[:, 2:6].isnan().all()
    assert not got[:, (0, 1, 6, 7)].isnan().any()


def metrics_do_not_cancel():
    # Nearly all of the mass on one token: E[x²] - E[x]² would have no digit left.
    logits = random(4, 6000) * 0.1 + 1000
    logits[:, 17] += 25
    got, want = metrics_of(logits).double(), reference_of(logits)
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)


def metrics_do_not_depend_on_the_batch():
    logits = mixed(10, 9000, 3)
    together = metrics_of(logits)
    for row in range(10):
        assert torch.equal(metrics_of(logits[row : row + 1])[:, 0], together[:, row])
    shuffled = torch.randperm(10)
    assert torch.equal(metrics_of(logits[shuffled]), together[:, shuffled])
    strided = torch.full((10, 9500), torch.nan)
    strided[:, :9000] = logits
    assert torch.equal(metrics_of(strided[:, :9000]), together)
    assert metrics_of(logits[:0]).shape == (3, 0)


# --- candidates and filters -------------------------------------------------------------------------------------------


def parameters_of(rows, *, top_k=None, top_p=None, min_p=None, samples=None, temperature=None):
    """Every combination in turn, or one value for all."""

    def column(value, choices):
        chosen = [choices[row % len(choices)] if value is None else value for row in range(rows)]
        return torch.tensor(chosen)

    return Parameters(
        temperature=column(temperature, [0.7, 1.3, 0.3]).float(),
        top_p=column(top_p, [0.9, 1.0, 0.5, 0.0]).float(),
        top_k=column(top_k, [1, 2, 27, 40, 100, 5, 128]),
        min_p=column(min_p, [0.0, 0.03, 0.3, 0.0, 1.0]).float(),
        samples=column(samples, [1, 5, 1, 2, 12, 64]),
    )


def distributed(logits, parameters, forced=None, sampled=None, wide=False):
    """The kernels' log-probabilities."""
    rows = len(logits)
    forced = torch.full((rows,), -1) if forced is None else forced
    sampled = torch.ones(rows, dtype=torch.bool) if sampled is None else sampled
    logits, p = logits.clone(), parameters
    largest = int(p.top_k.max()) if rows else 1
    _entropy, _varentropy, log_normaliser, maxima = logits_metrics.logits_metrics(logits)
    candidates.distribute(logits, p.temperature, p.top_p, p.top_k, p.min_p, p.samples, forced, sampled, largest, maxima)
    if wide:
        of_rows = (p.temperature, p.top_p, p.top_k, p.min_p, forced, sampled, log_normaliser)
        wide_filters.filter_wide_rows(logits, *of_rows, maxima)
    return logits


def expected(logits, parameters, dtype=torch.float64):
    """Probabilities by the functions in PyTorch, ``[rows, vocab]``."""
    exact = dataclasses.replace(
        parameters,
        temperature=parameters.temperature.to(dtype),
        top_p=parameters.top_p.to(dtype),
        min_p=parameters.min_p.to(dtype),
    )
    kept = filters.candidates(logits.to(dtype), int(parameters.top_k.max()))
    probabilities = best_of_n(kept, filters.filtered(kept, exact), parameters.samples)
    return torch.zeros_like(logits, dtype=dtype).scatter_(-1, kept.token_ids, probabilities)


def assert_same_distribution(got, want):
    torch.testing.assert_close(got.exp().double(), want.double(), rtol=2e-4, atol=2e-7)
    # The same tokens are kept, but for those that rounding puts on either side of top_p or min_p.
    differ = (got > -torch.inf) != (want > 0)
    assert (got.exp() + want)[differ].sum() < 1e-5


def distributions_equal_the_filters():
    for vocabulary in (1, 2, 40, 1000, 4096, 4097, 9000):
        logits = mixed(14, vocabulary, vocabulary + 1)
        parameters = parameters_of(14)
        got = distributed(logits, parameters)
        for dtype in (torch.float32, torch.float64):
            assert_same_distribution(got, expected(logits, parameters, dtype))


def ties_are_kept_by_lowest_id():
    logits = torch.zeros(4, 5000)
    logits[1] = (random(5000) * 2).round()  # thousands share each value: more than the buffer holds
    logits[2, 4000:] = 1.0
    logits[3, ::2], logits[3, 1::2] = -0.0, 0.0  # equal
    parameters = parameters_of(4, top_k=40, top_p=1.0, min_p=0.0, temperature=1.0, samples=1)
    got = distributed(logits, parameters)
    want = expected(logits, parameters)
    assert torch.equal(got > -torch.inf, want > 0)
    assert (got[0] > -torch.inf).nonzero().flatten().tolist() == list(range(40))
    assert (got[3] > -torch.inf).nonzero().flatten().tolist() == list(range(40))
    torch.testing.assert_close(got.exp().double(), want, rtol=1e-5, atol=1e-7)
    # Best of n treats equal logits as one, also where top_p cuts through them.
    for top_p in (1.0, 0.51):
        parameters = parameters_of(4, top_k=40, top_p=top_p, min_p=0.0, temperature=1.0, samples=5)
        assert_same_distribution(distributed(logits, parameters), expected(logits, parameters))


def large_top_k():
    # The larger buffer, up to where the search for a border begins.
    logits = mixed(5, 6000, 5)
    for top_k in (129, 1024):
        parameters = parameters_of(5, top_k=top_k)
        assert_same_distribution(distributed(logits, parameters), expected(logits, parameters))


def wide_top_k():
    logits = mixed(12, 5000, 6)
    logits[1, 2500:] = -torch.inf
    logits[2, 1:] = -torch.inf
    logits[3] = -torch.inf
    logits[4] = (logits[4] * 2).round()
    logits[5, 3] = torch.inf
    for top_k in (1025, 3000, 5000, 10**6):
        for top_p in (None, 1.0):
            parameters = parameters_of(12, top_k=top_k, top_p=top_p, samples=1)
            assert_same_distribution(distributed(logits, parameters, wide=True), expected(logits, parameters))


def wide_ties():
    logits = torch.zeros(2, 5000)
    logits[1, ::3] = 1.0
    for top_p in (1.0, 0.5, 0.9):
        parameters = parameters_of(2, top_k=3000, top_p=top_p, min_p=0.0, temperature=1.0, samples=1)
        got, want = distributed(logits, parameters, wide=True), expected(logits, parameters)
        # Of equal logits the first that together reach top_p. Float64 can't say which these are: its running sum of 1/3000
        # passes 0.5 a token too late or not, by the order in which a device adds.
        want[0] = torch.arange(5000) < math.ceil(3000 * float(parameters.top_p[0]))
        want[0] /= want[0].sum()
        assert torch.equal(got > -torch.inf, want > 0)
        torch.testing.assert_close(got.exp().double(), want, rtol=1e-5, atol=1e-8)


def wide_ties_over_tiles():
    """Logits of 16 bits: every value many times, in all tiles; both signs of zero at the border."""
    vocabulary = 2 * 4096 + 100
    logits = (random(6, vocabulary, seed=12) * 2).to(torch.bfloat16).float()
    logits[1] = 0.0
    logits[2] = torch.where(logits[2] > 4, 4.0, logits[2].sign() * 0.0)
    logits[3] = logits[3].sign()
    logits[4, :5000] = -torch.inf
    for top_k in (vocabulary, 3000):
        # No sum of equal shares meets these.
        for top_p in (1.0, 0.91307, 0.10073, 0.0):
            parameters = parameters_of(6, top_k=top_k, top_p=top_p, min_p=0.0, samples=1)
            got, want = distributed(logits, parameters, wide=True), expected(logits, parameters)
            assert_same_distribution(got, want)
            for row in range(6):
                kept = got[row] > -torch.inf
                # Of those equal to the smallest that stays, the first.
                equal = logits[row] == logits[row][kept].min()
                assert torch.equal(kept[equal].int(), kept[equal].int().sort(descending=True).values)


def wide_filters_of_every_kind():
    """Each filter alone and with the others, over several tiles, at temperatures that make one token or all of them likely."""
    logits = mixed(8, 9001, 13)
    for top_k in (9001, 2000):
        for temperature in (0.01, 1.0, 50.0):
            parameters = parameters_of(8, top_k=top_k, temperature=temperature, samples=1)
            parameters = dataclasses.replace(
                parameters,
                top_p=torch.tensor([1.0, 0.9137, 0.3171, 1.0, 0.9137, 0.0, 0.99, 0.6]),
                min_p=torch.tensor([0.0, 0.0, 0.0, 0.05, 0.05, 0.05, 0.0, 1e-4]),
            )
            assert_same_distribution(distributed(logits, parameters, wide=True), expected(logits, parameters))


def wide_rows_do_not_depend_on_the_batch():
    logits = mixed(9, 9001, 14)
    logits[3] = logits[3].to(torch.bfloat16).float()
    logits[5, 17] = torch.nan
    parameters = parameters_of(9, top_k=9001, samples=1)
    parameters.top_k[1::3] = 4000
    together = distributed(logits, parameters, wide=True)
    for order in (torch.randperm(9), torch.tensor([7]), torch.tensor([4, 3, 2])):
        chosen = {field.name: getattr(parameters, field.name)[order] for field in dataclasses.fields(parameters)}
        assert torch.equal(distributed(logits[order], Parameters(**chosen), wide=True), together[order])


def narrow_and_wide_rows_together():
    logits = mixed(6, 3000, 7)
    parameters = parameters_of(6, samples=1, min_p=0.0)
    parameters.top_k[::2] = 2000
    got = distributed(logits, parameters, wide=True)
    assert_same_distribution(got, expected(logits, parameters))
    narrow_alone = distributed(logits, parameters)
    assert torch.equal(narrow_alone[::2], logits[::2])
    assert torch.equal(narrow_alone[1::2], got[1::2])


def strange_rows():
    logits = mixed(8, 5000, 8)
    logits[0, :4500] = -torch.inf
    logits[1, 1:] = -torch.inf
    logits[2] = -torch.inf
    logits[3, (4200, 4300)] = torch.inf
    logits[4, (4100, 4400)] = torch.nan
    logits[5] = torch.nan
    logits[6, 10:] = -torch.inf
    parameters = parameters_of(8, top_k=40, min_p=0.0)
    got = distributed(logits, parameters)
    assert_same_distribution(got, expected(logits, parameters))
    for row, token in ((1, 0), (2, 0), (3, 4200), (4, 4100), (5, 0)):
        assert (got[row] > -torch.inf).nonzero().flatten().tolist() == [token], row


def early_rows():
    logits = mixed(6, 5000, 9)
    sampled = torch.tensor([True, False, True, False, True, True])
    forced = torch.tensor([-1, -1, 4999, 3, 0, -1])
    parameters = parameters_of(6, top_k=40)
    parameters.top_k[5], parameters.temperature[5] = 1, 0.0  # argmax
    got = distributed(logits, parameters, forced, sampled)
    assert torch.equal(got[~sampled], logits[~sampled])
    for row, token in ((2, 4999), (4, 0), (5, int(logits[5].argmax()))):
        want = torch.full((5000,), -torch.inf)
        want[token] = 0.0
        assert torch.equal(got[row], want)
    assert_same_distribution(got[:1], expected(logits[:1], dataclasses.replace(parameters, **first_row(parameters))))


def first_row(parameters):
    return {field.name: getattr(parameters, field.name)[:1] for field in dataclasses.fields(parameters)}


def steps_in_reserved_memory():
    """The same bits as in memory of each step's own, whatever the step before left; steps of more rows take their own."""
    device = torch.get_default_device()
    with mock.patch.object(backend, "kernels_for", return_value="triton"):
        fresh, reserving = backend.backend_for(device), backend.backend_for(device)
    reserving.reserve(8, 5000, device)
    buffers = reserving._buffers
    for one in (*buffers.metrics, *buffers.candidates, *buffers.wide):
        one.fill_(torch.nan if one.is_floating_point() else 77)
    for rows in (8, 3, 8, 9):
        logits, parameters = mixed(rows, 5000, rows), parameters_of(rows, samples=1)
        parameters.top_k[::2] = 5000
        forced, written = torch.full((rows,), -1), torch.ones(rows, dtype=torch.bool)
        results = []
        for kernels in (fresh, reserving):
            drawn = logits.clone()
            metrics = kernels.statistics(drawn, reserved=True)
            # A sampler may measure other logits before the step's are written.
            kernels.statistics(-logits)
            kernels.write(
                drawn,
                backend.Draws(
                    *(parameters, "corrected", forced, written, metrics.log_normaliser, 5000, 1, True),
                    maxima=metrics.maxima,
                ),
            )
            results.append(drawn)
        assert torch.equal(*results)
        is_reserved = metrics.maxima.data_ptr() == buffers.metrics[1].data_ptr()
        assert is_reserved == (rows <= 8)


def rows_do_not_depend_on_the_batch():
    logits = mixed(12, 5000, 10)
    parameters = parameters_of(12)
    together = distributed(logits, parameters)
    for order in (torch.randperm(12), torch.tensor([7]), torch.tensor([4, 11, 2])):
        chosen = {field.name: getattr(parameters, field.name)[order] for field in dataclasses.fields(parameters)}
        assert torch.equal(distributed(logits[order], Parameters(**chosen)), together[order])
    assert distributed(logits[:0], parameters_of(0)).shape == (0, 5000)


def on_cpu(strategy):
    """hypothesis makes the same tensors on every device."""

    @st.composite
    def drawn(draw):
        with torch.device("cpu"):
            return draw(strategy)

    return drawn()


@PROPERTY
@given(on_cpu(strange.logits(VOCABULARIES, FLOATS)))
def metrics_of_random_strange_rows(logits):
    logits = logits.to(torch.get_default_device())
    twin = LogitsMetrics.from_logits(logits)
    want = torch.stack((twin.entropy, twin.varentropy, twin.log_normaliser))
    torch.testing.assert_close(metrics_of(logits), want, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(want[0].isfinite(), strange.has_softmax(logits))


@PROPERTY
@given(st.data(), on_cpu(strange.logits(VOCABULARIES)), st.booleans())
def draws_of_random_strange_rows(data, logits, wide):
    top_ks = (1, 5, 40, 1025, 3000) if wide else (1, 2, 5, 27, 40, 300)
    drawn = data.draw(on_cpu(strange.parameters(len(logits), top_ks, (1,) if wide else (1, 2, 5, 64))))
    logits = logits.to(torch.get_default_device())
    parameters = Parameters(*(getattr(drawn, field.name).to(logits.device) for field in dataclasses.fields(drawn)))
    want = expected(logits, parameters, torch.float32).log()
    strange.assert_same_draws(distributed(logits, parameters, wide=wide), want, logits)


# --- attention statistics ---------------------------------------------------------------------------------------------


def cache_of(layout, blocks, kv_heads, size, head_dim, dtype, seed):
    """Keys and values as backends keep them, seen as [blocks, kv_heads, size, 2 * head_dim]."""
    values = random(blocks, kv_heads, size, 2 * head_dim, seed=seed).to(dtype)
    if layout == "heads-first":
        return values
    if layout == "positions-first":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    wider = torch.full((blocks, kv_heads, size, 2 * head_dim + 16), torch.nan).to(dtype)
    wider[..., : 2 * head_dim] = values
    return wider[..., : 2 * head_dim]


def attention_case(
    *,
    layout="heads-first",
    dtype=torch.float32,
    heads=4,
    kv_heads=2,
    head_dim=32,
    size=16,
    lengths=(1, 15, 16, 17, 63, 64, 65, 130),
    layers=2,
    windows=(None, None),
    config=None,
    tolerance=2e-5,
    wanted=None,
    query_dtype=None,
    **settings,
):
    """All rows and layers against the function in PyTorch."""
    config = config or EntropixConfig()
    lengths = torch.tensor(lengths)
    rows, width = len(lengths), -(-int(lengths.max()) // size)
    query_dtype = query_dtype or (torch.bfloat16 if dtype.itemsize == 1 else dtype)
    scales = [scale_of(layer, kv_heads, dtype) for layer in range(layers)]
    query_scales = [scale_of(layer, kv_heads, query_dtype) for layer in range(layers)]
    requests = torch.randperm(rows + 2)[:rows]
    queries = (random(layers, rows, heads, head_dim, seed=9) * 2).to(query_dtype)
    kept = []
    for layer in range(layers):
        cache = cache_of(layout, 40, kv_heads, size, head_dim, dtype, seed=layer)
        keys = PlainKeys(cache, head_dim, scales[layer])
        attention = LayerAttention(
            keys,
            head_dim**-0.5 * (1 + layer),
            window=windows[layer % len(windows)],
            query_scale=query_scales[layer],
            **settings,
        )
        table = torch.randint(0, 40, (rows + 2, width + 1), dtype=torch.int32)
        kept.append(LayerRows(attention, queries[layer], table))
    wanted = torch.ones(rows, dtype=torch.bool) if wanted is None else torch.tensor(wanted)
    found = by_kernels(kept, requests, lengths, wanted, config)
    for layer, one in enumerate(kept):
        want = measure_layer_in_pytorch(one.layer, one.queries, one.block_table[requests], lengths, config)
        for metric, got in zip(METRICS, found[:, layer], strict=True):
            exact = getattr(want, metric)
            torch.testing.assert_close(
                got[wanted],
                exact[wanted],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, metric=metric, layer=layer: f"{metric} of layer {layer}: {m}",
            )
            assert got[~wanted].isnan().all()
    return kept, requests, lengths, config, found


def by_kernels(*arguments):
    """The statistics of layers, [4, layers, rows]."""
    found = measure_layers(*arguments)
    return torch.stack([getattr(found, metric) for metric in METRICS])


def attention_layouts():
    attention_case(layout="heads-first")
    for layout in ("positions-first", "wider"):
        attention_case(layout=layout, lengths=(3, 70))


def scale_of(layer, kv_heads, dtype):
    """What float8 is scaled with: one number, or in every second layer one for each key head."""
    if dtype.itemsize > 1:
        return None
    return torch.tensor(0.5 + layer) if layer % 2 == 0 else torch.linspace(0.4, 1.7, kv_heads)


def attention_types():
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        attention_case(dtype=dtype, lengths=(1, 17, 64, 65), tolerance=1e-4)
    attention_case(dtype=torch.float8_e4m3fn, query_dtype=torch.float8_e4m3fn, lengths=(1, 70), tolerance=1e-4)


def attention_shapes():
    for heads, kv_heads, head_dim, size in ((6, 6, 32, 16), (1, 1, 80, 32), (24, 1, 16, 48), (6, 2, 64, 128)):
        attention_case(heads=heads, kv_heads=kv_heads, head_dim=head_dim, size=size, lengths=(1, 47, 128, 129), layers=1)


def attention_lengths():
    # Around the edges of tiles and shares: of four tiles each, until there are 16 shares, from 4097 positions on of more.
    for lengths in ((255, 256, 257, 1025), (4096, 4097)):
        attention_case(lengths=lengths, size=64, layers=1, heads=2, kv_heads=1)


def attention_windows():
    attention_case(windows=(1, 40))
    attention_case(windows=(64, None), lengths=(64, 65, 100, 128, 129, 200))


def attention_variants():
    slopes, sinks = torch.tensor([0.5, 0.25, 0.1, 0.0]), torch.tensor([1.0, -2.0, 0.0, 5.0])
    lengths = (1, 40, 65)
    attention_case(lengths=lengths, softcap=3.0)
    attention_case(lengths=lengths, alibi_slopes=slopes, windows=(None, 30))
    attention_case(lengths=lengths, sinks=sinks.to(torch.bfloat16))
    attention_case(lengths=lengths, softcap=20.0, alibi_slopes=slopes, sinks=sinks)


def attention_padding():
    original = EntropixConfig.preset("jax-2024-10", fidelity="original")
    assert original.padded_positions
    attention_case(config=original, lengths=(1, 65, 200))
    attention_case(config=original, lengths=(1, 65), sinks=torch.tensor([1.0, -2.0, 0.0, 5.0]))
    for rule in ("heads", "heads-unbiased", "zero"):
        own = {"fidelity": "original", "original": {"attention_varentropy": rule, "padded_positions": 10}}
        attention_case(config=EntropixConfig.from_dict(own), lengths=(65, 3), layers=1)


def attention_rows_that_are_not_wanted():
    attention_case(wanted=[True, False, True, False, False, True, True, False])
    attention_case(wanted=[False] * 8)


def attention_without_room_in_the_scratch():
    for case in ({}, {"heads": 6, "kv_heads": 2, "softcap": 3.0, "layers": 1}):
        layers, requests, lengths, config, with_room = attention_case(lengths=(130, 5, 300), **case)
        wanted = torch.ones(3, dtype=torch.bool)
        number, heads = len(layers), layers[0].queries.shape[1]
        for rows, tiles in ((3, 0), (3, 5), (2, 0), (1, 0)):
            # The rows of a launch, and room for tiles of a layer.
            sizes = workspace.sizes_of(number, rows, heads, shares.splits_of(320))
            size = sum(sizes.values()) + number * heads * shares.TILE * tiles
            with (
                mock.patch.object(workspace, "WORKSPACE", size),
                mock.patch.object(attention_statistics, "Launch", side_effect=attention_statistics.Launch) as launched,
            ):
                without = by_kernels(layers, requests, lengths, wanted, config)
            assert launched.call_count == -(-3 // rows)
            assert torch.equal(without, with_room)


def attention_of_whole_rows():
    slopes, sinks = torch.tensor([0.5, 0.25, 0.1, 0.0]), torch.tensor([1.0, -2.0, 0.0, 5.0])
    original = EntropixConfig.preset("jax-2024-10", fidelity="original")
    for programs, case in (
        # One begins when another has ended, so the first takes all rows.
        (3, {"lengths": (130, 5, 1, 600)}),
        (1, {"lengths": (4200, 70, 300), "heads": 2, "kv_heads": 1, "size": 64, "layers": 1}),
        (1, {"lengths": (65, 3, 200), "windows": (64, None), "dtype": torch.bfloat16, "tolerance": 1e-4}),
        (1, {"lengths": (130, 5, 300), "heads": 6, "wanted": [True, False, True]}),
        (1, {"lengths": (65, 3, 200), "softcap": 20.0, "alibi_slopes": slopes, "sinks": sinks, "config": original}),
    ):
        *arguments, config, shared = attention_case(**case)
        layers, _requests, lengths = arguments
        wanted = torch.tensor(case.get("wanted", [True] * len(lengths)))
        number, heads = len(layers), layers[0].queries.shape[1]
        block_table = layers[0].block_table
        longest = block_table.shape[1] * case.get("size", 16)
        with (
            mock.patch.object(workspace, "PROGRAMS", programs),
            mock.patch.object(workspace, "FEWEST", programs),
            mock.patch.object(workspace, "ROWS_EACH", 1),
        ):
            sizes = workspace.sizes_of(number, len(lengths), heads, shares.splits_of(longest))
            size = sum(sizes.values()) + (programs + 1) * heads * (longest + shares.TILE)
            with (
                mock.patch.object(workspace, "WORKSPACE", size),
                mock.patch.object(attention_statistics, "attend", side_effect=AssertionError("they are shared")),
            ):
                whole = by_kernels(*arguments, wanted, config)
        assert torch.equal(whole.nan_to_num(7.0), shared.nan_to_num(7.0)), case


def attention_rows_do_not_depend_on_the_batch():
    for dtype in (torch.float32, torch.bfloat16):
        layers, requests, lengths, config, together = attention_case(dtype=dtype, lengths=(130, 1, 64), tolerance=1e-4)
        wanted = torch.ones(3, dtype=torch.bool)
        for order in (torch.tensor([0]), torch.tensor([2, 0]), torch.tensor([1, 2, 0])):
            some_rows = [dataclasses.replace(one, queries=one.queries[order]) for one in layers]
            some = by_kernels(some_rows, requests[order], lengths[order], wanted[: len(order)], config)
            assert torch.equal(some, together[:, :, order])
        assert torch.equal(by_kernels(layers[1:], requests, lengths, wanted, config), together[:, 1:])


def a_layer_is_measured_by_them():
    keys = PlainKeys(cache_of("heads-first", 40, 2, 16, 32, torch.float32, seed=3), 32)
    layer, lengths = LayerAttention(keys, 0.2, window=50), torch.tensor([3, 70])
    arguments = (layer, random(2, 4, 32, seed=4), torch.randint(0, 40, (2, 5)), lengths, EntropixConfig())
    with (
        mock.patch.object(launches, "kernels_for", return_value="triton"),
        mock.patch.object(statistics, "measure_layer_in_pytorch", side_effect=AssertionError("it was called")),
    ):
        got = measure_layer(*arguments)
    want = measure_layer_in_pytorch(*arguments)
    for metric in METRICS:
        torch.testing.assert_close(getattr(got, metric), getattr(want, metric), rtol=2e-5, atol=2e-5)


def over_ranks(case, number):
    """A case's statistics by ranks that have its heads together, and how much they exchanged."""
    layers, requests, lengths, config, wanted = case
    meeting = Meeting(number)

    def part(rank, one):
        layer, share = one.layer, lambda values: None if values is None else values.chunk(number)[rank]
        keys = dataclasses.replace(layer.keys, cache=layer.keys.cache.chunk(number, dim=1)[rank])
        own = dataclasses.replace(layer, keys=keys, alibi_slopes=share(layer.alibi_slopes), sinks=share(layer.sinks))
        return LayerRows(own, one.queries.chunk(number, dim=1)[rank], one.block_table)

    parts = [[part(rank, one) for one in layers] for rank in range(number)]
    bounds = lengths.cpu() + 3  # which needn't be exact

    def work(rank):
        return ranks.measure_over_ranks_by_triton(parts[rank], requests, lengths, wanted, bounds, config, meeting.ranks(rank))

    first, *others = ([getattr(found, metric) for metric in METRICS] for found in meeting.run(work))
    first = torch.stack(first)
    for other in others:
        assert torch.equal(torch.stack(other).nan_to_num(7.0), first.nan_to_num(7.0)), "ranks must agree to the bit"
    return first, meeting.exchanged


def ranked_case(number, kinds=1, **settings):
    """Heads over ranks against one rank that has all of them."""
    *arguments, alone = attention_case(heads=2 * number, kv_heads=number, **settings)
    wanted = ~alone[0, 0].isnan()
    case = (*arguments, wanted)
    found, exchanged = over_ranks(case, number)
    torch.testing.assert_close(found, alone, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert len(exchanged) == kinds + 1
    assert exchanged[-1] == alone[0].numel() * (2 + 2)
    return case, found


def heads_over_ranks():
    ranked_case(2, lengths=(1, 64, 130))
    ranked_case(3, lengths=(1, 65, 130), wanted=[True, False, True], layers=1)


def heads_over_ranks_of_every_kind():
    slopes, sinks = torch.tensor([0.5, 0.25, 0.1, 0.0]), torch.tensor([1.0, -2.0, 0.0, 5.0])
    ranked_case(2, kinds=2, windows=(64, None), lengths=(64, 130))
    ranked_case(2, lengths=(1, 70), softcap=20.0, layers=1, alibi_slopes=slopes, sinks=sinks)
    original = EntropixConfig.preset("jax-2024-10", fidelity="original")
    ranked_case(2, config=original, lengths=(1, 65), layers=1)


def heads_over_ranks_in_parts():
    case, whole = ranked_case(2, lengths=(130, 5, 70), wanted=[True, False, True])
    block_table = case[0][0].block_table
    longest = block_table.shape[1] * 16
    # A number for each position, and one for each row's padded slots; bounds are 3 too high.
    of_all, of_wanted = 130 + 5 + 70 + 3 * 3 + 3, 130 + 70 + 3
    without_room = sum(workspace.sizes_of(1, 3, 2, 1).values())
    for module, name, value, each, exchanges in (
        (workspace, "EXCHANGE", 2 * of_all, of_all, 2),  # a layer at a time
        (workspace, "EXCHANGE", 1, longest + 1, 6),  # a row at a time
        (workspace, "WORKSPACE", without_room, of_all, 2),  # scores are computed again
        (ranks, "WORTH_WAITING", 0, 2 * of_wanted, 1),
    ):
        with mock.patch.object(module, name, value):
            found, exchanged = over_ranks(case, 2)
        assert exchanged[:-1] == [each] * exchanges, (name, value)
        assert torch.equal(found.nan_to_num(7.0), whole.nan_to_num(7.0)), (name, value)
    found, _ = over_ranks((*case[:-1], torch.zeros_like(case[-1])), 2)
    assert found.isnan().all()


def an_observer_launches_once_for_each_kind_of_layer():
    layers = {index: types.SimpleNamespace(layer_name=f"layers.{index}", kv_cache=object()) for index in range(3)}
    observer = AttentionObserver(layers, EntropixConfig(), max_requests=3, rows_per_request=2)
    lengths = torch.tensor([70, 5, 33])
    for index, (heads, size) in enumerate([(4, 16), (4, 16), (6, 32)]):
        keys = PlainKeys(cache_of("heads-first", 40, 2, size, 32, torch.float32, seed=index), 32)
        observer._attention[index] = (layers[index].kv_cache, LayerAttention(keys, 0.2))
        observer._queries[index] = random(3, 2, heads, 32, seed=index)
        table = torch.randint(0, 40, (3, 5), dtype=torch.int32)
        observer._steps[index] = observer_module._Step(torch.tensor([0, 2, 4, 6]), lengths, table, 3, 70, lengths.cpu())
    requests, positions = torch.tensor([2, 0, 1, 0]), torch.tensor([32, 69, 4, 68])
    wanted = torch.tensor([True, True, False, True])
    want = observer.statistics_per_layer(requests, positions, wanted)
    with (
        mock.patch.object(launches, "kernels_for", return_value="triton"),
        mock.patch.object(
            attention_statistics, "attention_statistics", side_effect=attention_statistics.attention_statistics
        ) as launched,
    ):
        got = observer.statistics_per_layer(requests, positions, wanted)
    assert launched.call_count == 2
    for metric in METRICS:
        torch.testing.assert_close(getattr(got, metric), getattr(want, metric), rtol=2e-5, atol=2e-5, equal_nan=True)
        assert getattr(got, metric)[:, 2].isnan().all()


def an_observer_keeps_queries_and_measures_them():
    """As on a GPU: allocated beforehand, copied by one launch a layer, gathered by the kernels."""
    device = torch.get_default_device()
    backend = types.SimpleNamespace(get_name=lambda: "TRITON_ATTN")
    shape = {"num_heads": 4, "head_size": 32, "query_quant": None, "attn_backend": backend}
    layers = {index: types.SimpleNamespace(layer_name=f"layers.{index}", kv_cache=object(), **shape) for index in (3, 1)}
    starts, lengths = torch.tensor([0, 2, 5, 6], dtype=torch.int32), torch.tensor([70, 5, 33], dtype=torch.int32)
    requests, positions = torch.tensor([2, 0, 1, 0]), torch.tensor([32, 69, 4, 68])
    found = []
    for kernels in ("triton", None):
        with (
            mock.patch.object(observer_module, "kernels_for", return_value=kernels),
            mock.patch.object(launches, "kernels_for", return_value=kernels),
            mock.patch.object(statistics, "kernels_for", return_value=None),
        ):
            observer = AttentionObserver(layers, EntropixConfig(), max_requests=4, rows_per_request=2)
            observer.reserve(torch.float32, device, 80)
            reserved = dict(observer._queries)
            assert len({one.untyped_storage().data_ptr() for one in reserved.values()}) == (kernels == "triton")
            for index in layers:
                keys = PlainKeys(cache_of("heads-first", 40, 2, 16, 32, torch.float32, seed=index), 32)
                observer._attention[index] = (layers[index].kv_cache, LayerAttention(keys, 0.2))
                table = torch.arange(15, dtype=torch.int32).view(3, 5) + index
                step = observer_module._Step(starts, lengths, table, 3, 70, lengths.cpu())
                observer._steps[index] = step
                # As a model gives them: between keys and values.
                query = random(7, 8, 32, seed=index)[:, 2:6]
                observer._keep(index, query, step)
            assert all(observer._queries[index] is one for index, one in reserved.items())
            kept = torch.stack([observer._queries[index][:3] for index in layers])
            measured = [observer.statistics_per_layer(requests, positions)]
            # What is known of the layers goes by where their caches and queries are.
            observer._queries[1] = -observer._queries[1]
            measured.append(observer.statistics_per_layer(requests, positions))
            with mock.patch.object(layers[3], "kv_cache", object()):
                keys = PlainKeys(cache_of("heads-first", 40, 2, 16, 32, torch.float32, seed=7), 32)
                observer._attention[3] = (layers[3].kv_cache, LayerAttention(keys, 0.2))
                measured.append(observer.statistics_per_layer(requests, positions))
            found.append((kept, measured))
    (kept, by_kernels), (kept_in_pytorch, in_pytorch) = found
    assert torch.equal(kept, kept_in_pytorch)
    for got, want in zip(by_kernels, in_pytorch, strict=True):
        for metric in METRICS:
            torch.testing.assert_close(getattr(got, metric), getattr(want, metric), rtol=2e-5, atol=2e-5)
    assert not torch.equal(in_pytorch[0].interaction_strength, in_pytorch[2].interaction_strength)


def attention_refuses_keys_that_are_not_plain():
    packed = LayerAttention(CpuVectorKeys(torch.zeros(2, 1, 16, 64)), 1.0)
    one = LayerRows(packed, torch.zeros(1, 1, 32), torch.zeros(1, 1, dtype=torch.int32))
    row = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="plain keys"):
        measure_layers([one], row, row + 1, row == 0, EntropixConfig())


def attention_of_strange_keys():
    """NaN, infinities and huge numbers among queries or keys: what isn't a finite number is so in both."""
    table = torch.tensor([[1, 2, 3], [3, 4, 5], [2, 3, 4]], dtype=torch.int32)
    requests, lengths = torch.arange(3), torch.tensor([40, 33, 3])
    own = {"fidelity": "original", "original": {"attention_varentropy": "zero", "padded_positions": 50}}
    for number, among, config in (
        *((number, among, {}) for number in (torch.nan, torch.inf, -torch.inf, 1e30) for among in ("keys", "queries")),
        (torch.nan, "keys", own),
        (-torch.inf, "queries", own),
    ):
        config = EntropixConfig.from_dict(config)
        cache = cache_of("heads-first", 8, 2, 16, 32, torch.float32, seed=1)
        queries = random(3, 4, 32, seed=2)
        (cache[2, 1, 3] if among == "keys" else queries[1, 0])[5] = number
        layer = LayerAttention(PlainKeys(cache, 32), 0.2)
        got = by_kernels([LayerRows(layer, queries, table)], requests, lengths, lengths > 0, config)[:, 0]
        want = measure_layer_in_pytorch(layer, queries, table, lengths, config)
        strange.assert_same_attention(got, torch.stack([getattr(want, metric) for metric in METRICS]))


def the_sampler_decides_and_writes_by_them():
    logits, sampled = mixed_logits(12, 3000, 11), np.array([row % 5 != 3 for row in range(12)])
    for base in ({}, {"top_k": 2000, "top_p": 0.99, "min_p": 0.0}):
        want, want_records = apply(logits, False, sampled, clarification=(17, 18), base=base)
        with mock.patch.object(backend, "kernels_for", return_value="triton"):
            got, got_records = apply(logits, True, sampled, clarification=(17, 18), base=base)
        torch.testing.assert_close(got_records, want_records, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(got[~torch.from_numpy(sampled)], logits[~torch.from_numpy(sampled)])
        assert_same_distribution(got[torch.from_numpy(sampled)], want[torch.from_numpy(sampled)].exp())


def samplers_write_with_a_rule_and_without():
    """Rows of samplers that plan with the requests' own parameters are drawn from these, by a kernel's rule and by a plan."""
    own = [(0.5 + 0.1 * row, 0.9, 40.0, 0.02 * (row % 3)) for row in range(9)]
    logits = mixed(9, 3000, 15)
    config, device = EntropixConfig(), logits.device
    for samplers in (["min_p"], ["top_n_sigma"], ["min_p", "top_n_sigma", "entropix"]):
        written = []
        for kernels, without in ((None, []), ("triton", []), ("triton", samplers)):
            with mock.patch.object(backend, "kernels_for", return_value=kernels):
                batch = BatchSampler(config, 9, None, device)
            for name in without:
                batch.samplers[name].kernel_rule = lambda backend: None
            for row in range(9):
                name = samplers[row % len(samplers)]
                numbers = [value for _, value in batch.samplers[name].numbers()]
                batch.add(
                    str(row),
                    Sequence(
                        numbers,
                        sampled=row != 4,
                        traced=False,
                        allow_clarification=False,
                        prompt_length=1,
                        sampler=name,
                        base=own[row],
                    ),
                )
            batch.sequences.flush()
            slots = batch.sequences.slots_of(map(str, range(9)), 9)
            here = torch.arange(9)
            drawn = logits.clone()
            batch.apply(drawn, Rows(torch.from_numpy(slots).to(device), slots, here + 10, here, here >= 0, here), None)
            written.append(drawn)
        want, *others = written
        for got in others:
            assert torch.equal(got[4], logits[4])
            rest = here != 4
            assert_same_distribution(got[rest], want[rest].exp())


def repetitions_equal_pytorch():
    with torch.device("cpu"):
        texts = repeating_texts()
    device = torch.get_default_device()
    for tokens, enough in texts:
        found = repetitions.repetitions(tokens.to(device), enough.to(device)).cpu()
        assert torch.equal(found, repetitions_by_torch(tokens, enough))


CHECKS = (
    metrics_equal_float64,
    spreads_equal_float64,
    metrics_of_other_types,
    metrics_of_strange_rows,
    metrics_do_not_cancel,
    metrics_do_not_depend_on_the_batch,
    distributions_equal_the_filters,
    ties_are_kept_by_lowest_id,
    large_top_k,
    wide_top_k,
    wide_ties,
    wide_ties_over_tiles,
    wide_filters_of_every_kind,
    wide_rows_do_not_depend_on_the_batch,
    narrow_and_wide_rows_together,
    strange_rows,
    early_rows,
    rows_do_not_depend_on_the_batch,
    steps_in_reserved_memory,
    metrics_of_random_strange_rows,
    draws_of_random_strange_rows,
    attention_layouts,
    attention_types,
    attention_shapes,
    attention_lengths,
    attention_windows,
    attention_variants,
    attention_padding,
    attention_rows_that_are_not_wanted,
    attention_without_room_in_the_scratch,
    attention_of_whole_rows,
    attention_rows_do_not_depend_on_the_batch,
    attention_of_strange_keys,
    a_layer_is_measured_by_them,
    an_observer_launches_once_for_each_kind_of_layer,
    an_observer_keeps_queries_and_measures_them,
    attention_refuses_keys_that_are_not_plain,
    heads_over_ranks,
    heads_over_ranks_of_every_kind,
    heads_over_ranks_in_parts,
    the_sampler_decides_and_writes_by_them,
    samplers_write_with_a_rule_and_without,
    repetitions_equal_pytorch,
    *chain_checks.CHECKS,
    *decision_checks.CHECKS,
)


def main():
    results = {}
    for check in CHECKS:
        torch.manual_seed(0)
        try:
            check()
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc()[-3000:]
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
