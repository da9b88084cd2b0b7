"""The decision stands twice, in PyTorch and as a CPU kernel: both give the same bits under any settings."""

import annotated_types
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import strange_rows
from vllm_entropix import EntropixConfig
from vllm_entropix.distribution.constants import Constants
from vllm_entropix.samplers.entropix import Entropix
from vllm_entropix.samplers.entropix.parameters import confidence, parameters
from vllm_entropix.samplers.entropix.presets import PUBLISHED
from vllm_entropix.samplers.entropix.regimes import classify
from vllm_entropix.sampling import AttentionStatistics, EntropixSampler, LogitsMetrics, Regime

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
NAMES = [name for name, _ in EntropixConfig.preset().numbers()]
COLUMNS = {name: column for column, name in enumerate(NAMES)}
RESULTS = ("regime", "temperature", "top_p", "top_k", "min_p", "samples", "confidence")
ROWS = 64
# Numbers that the decision doesn't read: none.
NOT_READ: frozenset[str] = frozenset()


def bounds(name):
    """A setting's smallest and largest value, and whether it is whole."""
    model, field = EntropixConfig, None
    for part in name.split("."):
        field = model.model_fields[part]
        model = field.annotation
    low = next(rule.ge if isinstance(rule, annotated_types.Ge) else rule.gt + 1e-3 for rule in field.metadata
               if isinstance(rule, (annotated_types.Ge, annotated_types.Gt)))  # fmt: skip
    high = next(rule.le for rule in field.metadata if isinstance(rule, annotated_types.Le))
    return low, high, field.annotation is int


BOUNDS = {name: bounds(name) for name in NAMES}


def values(rng, name, start, rows):
    """Anywhere in a setting's range: mostly near ``start``, where regimes and caps are, and at its ends."""
    low, high, whole = BOUNDS[name]
    choices = np.stack(
        [
            *(np.full(rows, number) for number in (low, high, start, -start)),
            rng.uniform(low, high, rows),
            start * rng.uniform(0.3, 3, rows),
            start + rng.normal(size=rows),
        ]
    )
    drawn = rng.permuted(choices, axis=0)[0].clip(low, high)
    return drawn.round() if whole else drawn


def some_metrics(rng, rows):
    """Entropies and varentropies in all regimes, some not finite."""
    points = rng.uniform(0, 8, size=(2, rows)) * rng.choice([0.02, 0.5, 1.0, 3.0], size=(2, rows))
    strange = rng.random((2, rows)) < 0.03
    points[strange] = rng.choice([np.nan, np.inf, 0.0, 1e30], size=int(strange.sum()))
    entropy, varentropy = torch.tensor(points, dtype=torch.float32)
    return LogitsMetrics(entropy, varentropy, torch.zeros(rows))


def by_pytorch(metrics, attention, constants):
    regime = classify(metrics.entropy, metrics.varentropy, constants)
    return results(regime, parameters(regime, metrics, attention, constants), confidence(metrics, attention, constants))


def by_kernel(metrics, attention, constants):
    regime, _, chosen, score = EntropixSampler._by_numba(metrics, attention, constants)
    return results(regime, chosen, score)


def results(regime, chosen, score):
    return dict(
        zip(RESULTS, (regime, chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_p, chosen.samples, score), strict=True)
    )


def assert_same(got, want, what):
    for name in RESULTS:
        torch.testing.assert_close(
            got[name], want[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{what}, {name}: {m}"
        )


def some_attention(rng, kind, rows=ROWS):
    if kind == "none":
        return None
    *statistics, measured = strange_rows.attention(rng, rows)
    return AttentionStatistics(*statistics, measured if kind == "some" else None)


KINDS = ("none", "some", "all")


@PROPERTY
@given(st.integers(0, 2**32 - 1), st.sampled_from(EntropixConfig.preset_names()), st.sampled_from(KINDS), st.booleans())
def test_all_settings_moved(seed, preset, kind, one_row_of_constants):
    rng = np.random.default_rng(seed)
    start = dict(EntropixConfig.preset(preset).numbers())
    rows = 1 if one_row_of_constants else ROWS
    numbers = np.stack([values(rng, name, start[name], rows) for name in NAMES], axis=-1)
    constants = Constants(torch.tensor(numbers, dtype=torch.float32), COLUMNS)
    metrics, attention = some_metrics(rng, ROWS), some_attention(rng, kind)
    got = by_kernel(metrics, attention, constants)
    assert_same(got, by_pytorch(metrics, attention, constants), "all moved")
    # The third place that knows the rule: how many candidates there may be.
    sampler = Entropix(EntropixConfig())
    bounds = [sampler.bounds(dict(zip(COLUMNS, row, strict=True)), {}) for row in constants.values.tolist()]
    assert (got["top_k"] <= torch.tensor([bound.candidates for bound in bounds])).all()
    drawn = got["samples"] > 1
    assert (got["top_k"] <= torch.tensor([bound.drawn for bound in bounds]))[drawn].all()


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
@pytest.mark.parametrize("preset", PUBLISHED)  # the others leave regimes out, and what these would read
def test_each_setting_moved_and_read_by_both(preset, fidelity):
    rng = np.random.default_rng(0)
    start = dict(EntropixConfig.preset(preset, fidelity=fidelity).numbers())
    metrics = some_metrics(rng, 512)
    unread = []
    for name in NAMES:
        # Wide caps, so that what stands behind one is seen; a row for each of some values.
        base = start | {
            "adaptive.top_p_max": 1.0,
            "adaptive.top_k_max": 1000.0,
            "adaptive.min_p_max": 1.0,
            "adaptive.top_p_min": 0.01,
        }
        moved = torch.tensor([[*base.values()]] * 512, dtype=torch.float32)
        unmoved = Constants(moved.clone(), COLUMNS)
        moved[:, COLUMNS[name]] = torch.from_numpy(values(rng, name, start[name], 512))
        constants = Constants(moved, COLUMNS)
        read = {"kernel": False, "PyTorch": False}
        for kind in KINDS:
            attention = some_attention(rng, kind, 512)
            got, want = by_kernel(metrics, attention, constants), by_pytorch(metrics, attention, constants)
            assert_same(got, want, name)
            for copy, found, function in (("kernel", got, by_kernel), ("PyTorch", want, by_pytorch)):
                before = function(metrics, attention, unmoved)
                read[copy] |= any(not torch.equal(found[one].nan_to_num(7.0), before[one].nan_to_num(7.0)) for one in RESULTS)
        unread += [name for copy in read if not read[copy]]
    assert set(unread) == NOT_READ


def test_points_lie_in_all_regimes():
    metrics = some_metrics(np.random.default_rng(0), 512)
    constants = Constants.from_config(EntropixConfig(), torch.float32, "cpu")
    assert set(classify(metrics.entropy, metrics.varentropy, constants).tolist()) == set(map(int, Regime))
