"""CPU kernels and PyTorch on rows with NaN, infinities, masks, huge and denormal numbers (Triton's: ``triton_checks``).

Each kernel is given what its twin is given, so that no rounding of one step decides the next.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.test_cpu import apply
from tests.support import strange_rows
from tests.support.strange_rows import assert_same_draws, has_softmax
from vllm_entropix import EntropixConfig
from vllm_entropix.distribution import filters
from vllm_entropix.distribution.backend import Backend, Draws, NumbaBackend
from vllm_entropix.records.fields import names
from vllm_entropix.sampling import AttentionStatistics, EntropixSampler, LogitsMetrics, Regime

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMBA = NumbaBackend("cpu")
PRESETS = EntropixConfig.preset_names()


@PROPERTY
@given(strange_rows.logits(dtypes=FLOATS))
def test_metrics(logits):
    got = NUMBA.statistics(logits.float())
    want = LogitsMetrics.from_logits(logits)
    for name in ("entropy", "varentropy", "log_normaliser"):
        one, other = getattr(got, name), getattr(want, name)
        assert torch.equal(one.isfinite(), has_softmax(logits))
        assert torch.equal(one.isnan(), other.isnan())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@PROPERTY
@given(st.data(), strange_rows.logits(), st.booleans())
def test_draws(data, logits, forcing):
    rows, vocabulary = logits.shape
    parameters = data.draw(strange_rows.parameters(rows))
    log_normaliser = LogitsMetrics.from_logits(logits).log_normaliser
    forced = torch.full((rows,), -1)
    if forcing:
        forced[::2] = vocabulary - 1
    sampled = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    got, want = logits.clone(), logits.clone()
    for backend, target in ((NUMBA, got), (Backend("cpu"), want)):
        backend.write(target, Draws(parameters, "corrected", forced, sampled, log_normaliser, vocabulary, vocabulary))
    for written in (got, want):
        torch.testing.assert_close(written[~sampled], logits[~sampled], rtol=0, atol=0, equal_nan=True)
    free = sampled & (forced < 0)
    assert_same_draws(got[free], want[free], logits[free])
    assert torch.equal(got[sampled & ~free], want[sampled & ~free])


@PROPERTY
@given(strange_rows.logits(), st.integers(1, 20))
def test_alternatives(logits, count):
    count = min(count, logits.shape[1])
    values, token_ids = NUMBA.largest(logits, LogitsMetrics.from_logits(logits).log_normaliser, count)
    want = filters.candidates(logits, count)
    torch.testing.assert_close(values, want.logits, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(token_ids, want.token_ids)
    torch.testing.assert_close(values, logits.topk(count).values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
@pytest.mark.parametrize("preset", PRESETS)
@settings(PROPERTY, max_examples=12)
@given(logits=strange_rows.logits(dtypes=FLOATS), seed=st.integers(0, 2**32 - 1), attended=st.sampled_from(["none", "some"]))
def test_a_row_without_a_softmax_is_decided_by_the_base(preset, fidelity, logits, seed, attended):
    config = EntropixConfig.preset(preset, fidelity=fidelity)
    *metrics, measured = strange_rows.attention(np.random.default_rng(seed), len(logits))
    statistics = None if attended == "none" else AttentionStatistics(*metrics, measured)
    strange = ~has_softmax(logits)
    for kernels in (True, False):
        decision = EntropixSampler(config, kernels=kernels).decide(logits, statistics)
        assert (decision.regime[strange] == Regime.ADAPTIVE).all()
        for name, value in (
            ("temperature", config.base.temperature),
            ("top_p", config.base.top_p),
            ("min_p", config.base.min_p),
        ):
            torch.testing.assert_close(getattr(decision, name)[strange], torch.full((int(strange.sum()),), value))
        assert (decision.top_k[strange] == config.base.top_k).all()
        assert (decision.parameters.samples[strange] == 1).all()
        for name in ("temperature", "top_p", "min_p"):
            assert getattr(decision, name).isfinite().all()
        token_ids, probabilities = decision.distribution()
        drawn = torch.zeros(logits.shape).scatter_add_(-1, token_ids, probabilities.float()).log()
        assert_same_draws(drawn, drawn, logits)


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
@pytest.mark.parametrize(
    "base", [{}, {"min_p": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"top_k": 2000, "top_p": 1.0, "min_p": 0.0}]
)
@settings(PROPERTY, max_examples=8)
@given(logits=strange_rows.logits(dtypes=FLOATS))
def test_a_step_draws_nothing_that_is_masked(base, fidelity, logits):
    """The whole way of a step, by kernels and without, in every type; records of strange rows have all that needn't be NaN."""
    strange, sampled = ~has_softmax(logits), np.ones(len(logits), dtype=bool)
    found = [apply(logits, kernels, sampled, (0,), base, fidelity) for kernels in (True, False)]
    for written, records in found:
        assert_same_draws(written, written, logits)
        record = dict(zip(("slot", *names()), records[strange].T, strict=False))
        assert not record["forced"].any()
        for name in ("regime", "temperature", "top_p", "top_k", "min_p"):
            assert record[name].isfinite().all()
        for name in ("entropy", "varentropy"):
            assert record[name].isnan().all()
    (_, by_kernels), (_, by_pytorch) = found
    ids = slice(len(names()) + 1, None)
    torch.testing.assert_close(by_kernels[strange, : ids.start], by_pytorch[strange, : ids.start], equal_nan=True)
