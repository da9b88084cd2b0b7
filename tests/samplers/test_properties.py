"""What holds for every input: independence of rows, masks, ties, unusable numbers, and the science written a second time."""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vllm_entropix import EntropixConfig
from vllm_entropix.distribution import filters
from vllm_entropix.distribution.constants import Constants
from vllm_entropix.samplers.entropix.parameters import confidence, parameters
from vllm_entropix.samplers.entropix.regimes import classify
from vllm_entropix.sampling import AttentionStatistics, EntropixSampler, HeadStatistics, LogitsMetrics, Regime

# Deterministic: a failure is seen by everyone or by no one. The machine may be busy, so nothing is judged by time.
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
PRESETS = ("jax-2024-10", "torch-2024-10")
FIDELITIES = ("corrected", "original")
ATTENTION = ("attention_entropy", "attention_varentropy", "agreement", "interaction_strength")
METRICS = ("entropy", "varentropy", *ATTENTION)
PARAMETERS = ("temperature", "top_p", "top_k", "min_p", "samples")
INF, NAN = math.inf, math.nan

presets = st.sampled_from(PRESETS)
fidelities = st.sampled_from(FIDELITIES)
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**32 - 1)
vocabularies = st.one_of(st.integers(1, 40), st.integers(41, 2000), st.integers(2001, 40_000))


def random_logits(seed: int, rows: int, vocabulary: int, dtype=torch.float64, tied: bool = False) -> torch.Tensor:
    """Rows of every kind: from nearly even to nearly certain; ``tied`` rounds, so that most values occur often."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, vocabulary)) * rng.choice([0.01, 0.5, 2.0, 6.0, 20.0], size=(rows, 1))
    # A heap of equally likely tokens under a few peaks gives high varentropy.
    values[:, : min(vocabulary, 3)] += rng.choice([0.0, 8.0], size=(rows, 1))
    return torch.tensor(values.round() if tied else values, dtype=dtype)


def random_statistics(seed: int, rows: int, dtype=torch.float64) -> AttentionStatistics:
    rng = np.random.default_rng(seed)
    scale = {"attention_entropy": 10.0, "attention_varentropy": 4.0, "agreement": 0.3, "interaction_strength": 8.0}
    return AttentionStatistics(**{name: torch.tensor(rng.random(rows) * scale[name], dtype=dtype) for name in ATTENTION})


def select(statistics: AttentionStatistics, rows) -> AttentionStatistics:
    return AttentionStatistics(*(getattr(statistics, name)[rows] for name in ATTENTION))


def sampler(preset: str = "jax-2024-10", **changes) -> EntropixSampler:
    return EntropixSampler(EntropixConfig.preset(preset, **changes))


def same(left: torch.Tensor, right: torch.Tensor, what: str = "") -> None:
    """Bitwise equal, NaN equal to NaN."""
    assert left.dtype == right.dtype, what
    assert left.shape == right.shape, what
    assert torch.equal(torch.nan_to_num(left, 1e30), torch.nan_to_num(right, 1e30)), what
    assert torch.equal(left.isnan(), right.isnan()), what


def assert_same_decision(decision, expected, rows) -> None:
    """``expected`` is ``decision`` of these rows, bitwise: metrics, regime, parameters and confidence."""
    for name in METRICS:
        same(getattr(decision.metrics, name)[rows], getattr(expected.metrics, name), name)
    for name in PARAMETERS:
        same(getattr(decision.parameters, name)[rows], getattr(expected.parameters, name), name)
    same(decision.regime[rows], expected.regime, "regime")
    same(decision.confidence[rows], expected.confidence, "confidence")


def dense(distribution, vocabulary: int) -> torch.Tensor:
    """``[rows, vocabulary]`` probabilities."""
    ids, probabilities = distribution
    return probabilities.new_zeros(ids.shape[0], vocabulary).scatter_add(-1, ids, probabilities)


def assert_valid(distribution, vocabulary: int) -> None:
    ids, probabilities = distribution
    assert torch.isfinite(probabilities).all()
    assert ((probabilities >= 0) & (ids >= 0) & (ids < vocabulary)).all()
    assert probabilities.sum(-1).tolist() == pytest.approx([1.0] * len(ids), abs=2e-6)
    assert (probabilities[:, 1:] <= probabilities[:, :-1] * (1 + 1e-6)).all(), "descending"
    assert (ids[probabilities == 0] == 0).all(), "padding"
    for row, kept in zip(ids, probabilities > 0, strict=True):
        assert len(set(row[kept].tolist())) == int(kept.sum()), "a token is listed twice"


# --- rows don't influence one another ---------------------------------------------------------------------------------


def assert_same_distribution(distribution, expected, row: int) -> None:
    """``expected`` is row ``row`` of ``distribution``, bitwise, up to padding."""
    width = expected.token_ids.shape[1]
    same(distribution.token_ids[[row], :width], expected.token_ids, "ids")
    same(distribution.probabilities[[row], :width], expected.probabilities, "probabilities")
    assert not distribution.probabilities[row, width:].any()


@PROPERTY
@given(seeds, st.integers(1, 6), vocabularies, dtypes, st.booleans(), presets, fidelities)
def test_a_rows_decision_does_not_depend_on_the_others(seed, rows, vocabulary, dtype, tied, preset, fidelity):
    logits, statistics = random_logits(seed, rows, vocabulary, dtype, tied), random_statistics(seed, rows, dtype)
    entropix = sampler(preset, fidelity=fidelity)
    together = entropix.decide(logits, statistics)
    for row in range(rows):
        alone = entropix.decide(logits[row : row + 1], select(statistics, [row]))
        assert_same_decision(together, alone, [row])


@PROPERTY
@given(seeds, st.integers(1, 6), vocabularies, dtypes, st.booleans(), presets, fidelities, st.booleans())
def test_a_rows_distribution_does_not_depend_on_the_others(seed, rows, vocabulary, dtype, tied, preset, fidelity, best_of_n):
    # Rows of other regimes have another top_k, hence another width of the tensors that the row is computed in.
    logits, statistics = random_logits(seed, rows, vocabulary, dtype, tied), random_statistics(seed, rows, dtype)
    entropix = sampler(preset, fidelity=fidelity)
    together = entropix.decide(logits, statistics).distribution(best_of_n)
    for row in range(rows):
        alone = entropix.decide(logits[row : row + 1], select(statistics, [row])).distribution(best_of_n)
        assert_same_distribution(together, alone, row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [8191, 8192, 8193, 16384, 20000, 128256])
def test_a_row_of_a_large_vocabulary_does_not_depend_on_the_others(vocabulary, dtype):
    logits = random_logits(vocabulary, 6, vocabulary, dtype)
    entropix = sampler()
    together = entropix.decide(logits)
    for row in range(6):
        assert_same_decision(together, entropix.decide(logits[row : row + 1]), [row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [8193, 20000, 128256])
def test_a_distribution_over_a_large_vocabulary_does_not_depend_on_the_others(vocabulary, dtype):
    logits, statistics = random_logits(vocabulary, 6, vocabulary, dtype), random_statistics(vocabulary, 6, dtype)
    entropix = sampler()
    together = entropix.decide(logits, statistics).distribution()
    for row in range(6):
        alone = entropix.decide(logits[row : row + 1], select(statistics, [row])).distribution()
        assert_same_distribution(together, alone, row)


@PROPERTY
@given(seeds, st.integers(2, 6), st.integers(1, 300), dtypes, fidelities)
def test_permuting_rows_permutes_results(seed, rows, vocabulary, dtype, fidelity):
    logits, statistics = random_logits(seed, rows, vocabulary, dtype), random_statistics(seed, rows, dtype)
    order = torch.tensor(np.random.default_rng(seed).permutation(rows))
    entropix = sampler(fidelity=fidelity)
    decision, permuted = entropix.decide(logits, statistics), entropix.decide(logits[order], select(statistics, order))
    assert_same_decision(decision, permuted, order)
    for before, after in zip(decision.distribution(), permuted.distribution(), strict=True):
        same(before[order], after)


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("bad", [[NAN] * 50, [NAN] + [0.0] * 49, [-INF] * 50, [INF] + [0.0] * 49])
def test_an_unusable_row_leaves_the_others_alone(bad, fidelity):
    logits = random_logits(3, 3, 50)
    logits[1] = torch.tensor(bad)
    entropix = sampler(fidelity=fidelity)
    together, others = entropix.decide(logits), entropix.decide(logits[[0, 2]])
    assert_same_decision(together, others, [0, 2])
    torch.testing.assert_close(dense(together.distribution(), 50)[[0, 2]], dense(others.distribution(), 50))


# --- masks, ties, small vocabularies ----------------------------------------------------------------------------------


@PROPERTY
@given(seeds, st.integers(2, 300), st.floats(0, 0.99), presets, fidelities)
def test_masked_tokens_are_as_good_as_absent(seed, vocabulary, share, preset, fidelity):
    logits = random_logits(seed, 1, vocabulary)
    present = torch.tensor(np.random.default_rng(seed).random(vocabulary) >= share)
    present[seed % vocabulary] = True
    entropix = sampler(preset, fidelity=fidelity)
    masked = entropix.decide(logits.masked_fill(~present, -INF), random_statistics(seed, 1))
    removed = entropix.decide(logits[:, present], random_statistics(seed, 1))
    for name in ("entropy", "varentropy"):
        torch.testing.assert_close(getattr(masked.metrics, name), getattr(removed.metrics, name), rtol=1e-10, atol=1e-12)
    probabilities = dense(masked.distribution(), vocabulary)
    assert not probabilities[:, ~present].any()
    expected = dense(removed.distribution(), int(present.sum()))
    torch.testing.assert_close(probabilities[:, present], expected, rtol=1e-8, atol=1e-12)
    assert_valid(masked.distribution(), vocabulary)


@PROPERTY
@given(st.lists(st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=40), st.integers(1, 45), dtypes)
def test_candidates_are_ordered_by_logit_then_by_id(values, count, dtype):
    token_ids, logits = filters.candidates(torch.tensor([values], dtype=dtype), count)
    expected = sorted(range(len(values)), key=lambda token: (-values[token], token))[:count]
    assert token_ids[0].tolist() == expected
    assert logits[0].tolist() == [values[token] for token in expected]


@PROPERTY
@given(seeds, st.integers(1, 300), st.integers(1, 320), dtypes)
def test_exactly_top_k_tokens_are_kept_and_the_lowest_ids_of_tied_ones(seed, vocabulary, top_k, dtype):
    logits = random_logits(seed, 4, vocabulary, dtype, tied=True).clamp(-4, 4)
    base = {"temperature": 1.0, "top_p": 1.0, "top_k": top_k, "min_p": 0.0}
    ids, probabilities = sampler(regimes=False, base=base).decide(logits).distribution()
    assert (probabilities > 0).sum(-1).tolist() == [min(top_k, vocabulary)] * 4
    for row in range(4):
        ordered = sorted(range(vocabulary), key=lambda token: (-logits[row, token].item(), token))
        assert ids[row].tolist() == ordered[:top_k]


def test_each_row_keeps_its_own_top_k_of_tied_tokens():
    # Two rows of a fork and one in between: different top_k in one batch, all tokens but one tied.
    entropix = sampler(base={"top_p": 1.0, "min_p": 0.0}, adaptive={"min_p": 0.0, "min_p_min": 0.0, "top_p_min": 1.0})
    logits = torch.zeros(3, 400)
    logits[:2, 7] = 9.0
    logits[2, 7] = 3.0
    statistics = AttentionStatistics(
        torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    )
    decision = entropix.decide(logits, statistics)
    assert [Regime(regime).name for regime in decision.regime.tolist()] == ["LEHV", "LEHV", "ADAPTIVE"]
    assert decision.top_k.tolist() == [40, 27, 51]
    ids, probabilities = decision.distribution()
    for row, count in enumerate([40, 27, 51]):
        kept = ids[row][probabilities[row] > 0].tolist()
        assert kept == [7, *(token for token in range(count) if token != 7)]


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("regimes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_token_vocabulary(dtype, regimes, fidelity):
    decision = sampler(fidelity=fidelity, regimes=regimes).decide(torch.tensor([[3.0], [-7.0], [0.0]], dtype=dtype))
    assert decision.metrics.entropy.tolist() == decision.metrics.varentropy.tolist() == [0.0] * 3
    assert decision.regime.tolist() == [Regime.LELV] * 3
    ids, probabilities = decision.distribution()
    assert ids.tolist() == [[0]] * 3
    assert probabilities.tolist() == [[1.0]] * 3


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_top_k_above_the_vocabulary_keeps_every_token(fidelity):
    base = {"temperature": 1.0, "top_p": 1.0, "top_k": 100_000, "min_p": 0.0}
    logits = random_logits(1, 2, 7)
    ids, probabilities = sampler(regimes=False, base=base, fidelity=fidelity).decide(logits).distribution()
    torch.testing.assert_close(dense((ids, probabilities), 7), logits.softmax(-1), rtol=1e-12, atol=0)


# --- unusable numbers -------------------------------------------------------------------------------------------------


def assert_base_parameters(decision, config: EntropixConfig) -> None:
    base = config.base
    for row in range(len(decision.regime)):
        assert decision.temperature[row].item() == pytest.approx(base.temperature)
        assert decision.top_p[row].item() == pytest.approx(base.top_p)
        assert decision.min_p[row].item() == pytest.approx(base.min_p)
        assert decision.top_k[row].item() == base.top_k
        assert decision.parameters.samples[row].item() == 1


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("row", [[-INF] * 3, [NAN] * 3, [NAN, 0.0, 1.0], [0.0, NAN, -INF], [INF, 0.0, 1.0], [INF, INF, -INF]])
def test_logits_without_metrics_give_base_parameters(row, fidelity, preset):
    entropix = sampler(preset, fidelity=fidelity)
    decision = entropix.decide(torch.tensor([row]), random_statistics(0, 1))
    assert decision.regime.tolist() == [Regime.ADAPTIVE]
    assert_base_parameters(decision, entropix.config)


@pytest.mark.parametrize("best_of_n", [True, False])
@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("row", [[NAN, 0.0, 1.0], [0.0, NAN, -INF], [INF, 0.0, 1.0], [-INF, 2.0, -INF], [1e30, -1e30, 0.0]])
def test_a_row_with_a_finite_logit_has_a_valid_distribution(row, fidelity, best_of_n):
    assert_valid(sampler(fidelity=fidelity).decide(torch.tensor([row])).distribution(best_of_n), 3)


LELV, HELV, LEHV, HEHV, ADAPTIVE = (0.01, 0.01), (6.0, 0.01), (3.0, 6.0), (6.0, 6.0), (2.0, 2.0)


def decide_parameters(config, points, attention, dtype=torch.float64):
    """Parameters, regime and confidence at given points of the entropy × varentropy plane."""
    entropy, varentropy = (torch.tensor(column, dtype=dtype) for column in zip(*points, strict=True))
    constants = Constants.from_config(config, dtype, "cpu")
    regime = classify(entropy, varentropy, constants)
    metrics = LogitsMetrics(entropy, varentropy, log_normaliser=torch.zeros_like(entropy))
    return parameters(regime, metrics, attention, constants), regime, confidence(metrics, attention, constants)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_statistics_that_are_not_finite_give_base_parameters(name, bad, preset):
    config = EntropixConfig.preset(preset)
    points = [LELV, HELV, LEHV, HEHV, ADAPTIVE]
    statistics = random_statistics(1, len(points))
    getattr(statistics, name).fill_(bad)
    chosen, regime, _ = decide_parameters(config, points, statistics)
    assert regime.tolist() == [0, 1, 2, 3, 4]
    assert chosen.temperature.tolist() == [0.0] + [config.base.temperature] * 4  # LELV reads no attention: still argmax
    assert chosen.top_k.tolist() == [1] + [config.base.top_k] * 4
    assert chosen.top_p.tolist() == [1.0] + [config.base.top_p] * 4
    assert chosen.min_p.tolist() == [0.0] + [config.base.min_p] * 4
    assert chosen.samples.tolist() == [1] * 5


def test_statistics_without_positions_give_base_parameters():
    config = EntropixConfig.preset()
    statistics = AttentionStatistics.from_scores(torch.randn(1, 4, 8), torch.tensor([0]), config)
    assert_base_parameters(EntropixSampler(config).decide(torch.tensor([[0.0, 1.0, 2.0]]), statistics), config)


@PROPERTY
@given(presets, fidelities, st.lists(st.sampled_from([0.0, 1e-3, 3.0, 1e30, NAN, INF, -INF]), min_size=6, max_size=6))
def test_parameters_are_never_nan(preset, fidelity, metrics):
    config = EntropixConfig.preset(preset, fidelity=fidelity)
    statistics = AttentionStatistics(*(torch.tensor([value], dtype=torch.float64) for value in metrics[2:]))
    chosen, _, _ = decide_parameters(config, [metrics[:2]], statistics)
    for name in PARAMETERS:
        assert math.isfinite(getattr(chosen, name).item()), name
    assert chosen.temperature.item() >= 0
    assert chosen.top_k.item() >= 1
    assert chosen.top_p.item() > 0


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_temperature_that_is_not_positive_gives_base_parameters(fidelity):
    config = EntropixConfig.preset(fidelity=fidelity)
    statistics = AttentionStatistics(*(torch.tensor([value]) for value in (0.0, 0.0, 100.0, 0.0)))
    chosen, regime, _ = decide_parameters(config, [ADAPTIVE], statistics)
    assert regime.item() == Regime.ADAPTIVE
    assert (chosen.temperature.item(), chosen.samples.item()) == (config.base.temperature, 1)


# --- the distribution -------------------------------------------------------------------------------------------------


@PROPERTY
@given(seeds, st.integers(1, 6), vocabularies, dtypes, st.booleans(), presets, fidelities, st.booleans())
def test_distributions_are_valid(seed, rows, vocabulary, dtype, tied, preset, fidelity, best_of_n):
    logits = random_logits(seed, rows, vocabulary, dtype, tied)
    decision = sampler(preset, fidelity=fidelity).decide(logits, random_statistics(seed, rows))
    distribution = decision.distribution(best_of_n)
    assert_valid(distribution, vocabulary)
    assert ((distribution.probabilities > 0).sum(-1) <= decision.top_k).all()


@pytest.mark.parametrize("with_attention", [True, False])
@pytest.mark.parametrize("regimes", [True, False])
@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_float64_stays_and_everything_else_becomes_float32(given_dtype, expected, fidelity, regimes, with_attention):
    # The statistics are of the other type, which must not leak.
    other = torch.float32 if expected == torch.float64 else torch.float64
    statistics = random_statistics(2, 3, other) if with_attention else None
    logits = random_logits(2, 3, 60, given_dtype)
    before = logits.clone()
    decision = sampler(fidelity=fidelity, regimes=regimes).decide(logits, statistics)
    results = {name: getattr(decision.metrics, name) for name in METRICS}
    results |= {name: getattr(decision, name) for name in ("temperature", "top_p", "min_p", "confidence")}
    results["probabilities"] = decision.distribution().probabilities
    assert {name: result.dtype for name, result in results.items()} == dict.fromkeys(results, expected)
    assert decision.top_k.dtype == decision.regime.dtype == decision.distribution().token_ids.dtype == torch.int64
    same(logits, before, "the given logits were changed")


@PROPERTY
@given(seeds, st.integers(1, 500), st.floats(-1000, 1000), fidelities)
def test_adding_a_constant_to_all_logits_changes_nothing(seed, vocabulary, constant, fidelity):
    logits, statistics = random_logits(seed, 3, vocabulary), random_statistics(seed, 3)
    entropix = sampler(fidelity=fidelity)
    plain, shifted = entropix.decide(logits, statistics), entropix.decide(logits + constant, statistics)
    for name in ("entropy", "varentropy"):
        torch.testing.assert_close(getattr(shifted.metrics, name), getattr(plain.metrics, name), rtol=1e-8, atol=1e-9, msg=name)
    assert plain.regime.tolist() == shifted.regime.tolist()
    assert plain.top_k.tolist() == shifted.top_k.tolist()
    for name in ("temperature", "top_p", "min_p"):
        torch.testing.assert_close(getattr(shifted, name), getattr(plain, name), rtol=1e-8, atol=1e-9, msg=name)
    torch.testing.assert_close(
        dense(shifted.distribution(), vocabulary), dense(plain.distribution(), vocabulary), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_without_regimes_every_row_is_drawn_with_the_base_parameters(preset):
    logits, statistics = random_logits(5, 6, 200), random_statistics(5, 6)
    on, off = (sampler(preset, regimes=switch).decide(logits, statistics) for switch in (True, False))
    assert len(set(on.regime.tolist())) > 1
    assert_base_parameters(off, EntropixConfig.preset(preset))
    same(on.regime, off.regime, "regimes are still reported")
    for name in METRICS:
        same(getattr(on.metrics, name), getattr(off.metrics, name), name)
    for folded, plain in zip(off.distribution(), off.distribution(best_of_n=False), strict=True):
        same(folded, plain)


# --- logits metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fair_coin_has_no_varentropy(dtype):
    # D25: "low varentropy", although it is a fork.
    metrics = LogitsMetrics.from_logits(torch.tensor([[0.3, 0.3], [-5.0, -5.0]], dtype=dtype))
    assert metrics.entropy.tolist() == pytest.approx([1.0, 1.0])
    assert metrics.varentropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


@PROPERTY
@given(seeds, vocabularies, dtypes, st.booleans(), st.booleans())
def test_logits_metrics_are_those_of_scipy(seed, vocabulary, dtype, tied, masked):
    logits = random_logits(seed, 2, vocabulary, dtype, tied)
    if masked:
        logits[:, 1 : vocabulary // 2] = -INF
    metrics = LogitsMetrics.from_logits(logits)
    tolerance = {"rel": 1e-10, "abs": 1e-12} if dtype == torch.float64 else {"rel": 1e-4, "abs": 1e-5}
    for row in range(2):
        probabilities = scipy.special.softmax(logits[row].double().numpy())
        entropy = scipy.stats.entropy(probabilities, base=2)
        positive = probabilities[probabilities > 0]
        varentropy = float(np.sum(positive * (np.log2(positive) + entropy) ** 2))
        assert metrics.entropy[row].item() == pytest.approx(entropy, **tolerance)
        assert metrics.varentropy[row].item() == pytest.approx(varentropy, **tolerance)


# --- attention statistics ---------------------------------------------------------------------------------------------


def literal_statistics(scores: np.ndarray, slots: int, varentropy: str) -> list[float]:
    """SEMANTICS 1 for one query, ``scores [heads, n]``, with zero-score slots really appended up to ``slots`` (D2)."""
    heads, length = scores.shape
    scores = np.concatenate([scores, np.zeros((heads, max(0, slots - length)))], axis=1)
    weights = np.stack([scipy.special.softmax(head) for head in scores])
    entropies = np.array([scipy.stats.entropy(head, base=2) for head in weights])
    variance = {"heads": np.var(entropies), "zero": 0.0}.get(varentropy)
    if varentropy == "heads-unbiased":
        variance = np.var(entropies, ddof=1)
    deviation = np.abs(weights - weights.mean(axis=0))
    return [entropies.mean(), variance, deviation.mean(), np.abs(scores).mean()]


@PROPERTY
@given(
    seed=seeds,
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    heads=st.integers(2, 6),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    slots=st.integers(1, 64),
    varentropy=st.sampled_from(["heads", "heads-unbiased", "zero"]),
    fidelity=fidelities,
)
def test_attention_statistics_are_those_of_a_literal_computation(seed, lengths, heads, scale, slots, varentropy, fidelity):
    config = EntropixConfig.preset(fidelity=fidelity, original={"padded_positions": slots, "attention_varentropy": varentropy})
    scores = np.random.default_rng(seed).normal(size=(len(lengths), heads, max(lengths))) * scale
    statistics = AttentionStatistics.from_scores(torch.tensor(scores), torch.tensor(lengths), config)
    for row, length in enumerate(lengths):
        real = scores[row, :, :length]
        # Corrected: neither padding nor the original's variance, whatever `original` says.
        literal = (
            literal_statistics(real, slots, varentropy) if fidelity == "original" else literal_statistics(real, 0, "heads")
        )
        for name, value in zip(ATTENTION, literal, strict=True):
            assert getattr(statistics, name)[row].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_pad_to_the_original_cache(preset):
    config = EntropixConfig.preset(preset, fidelity="original")
    scores = np.random.default_rng(4).normal(size=(1, 4, 9))
    statistics = AttentionStatistics.from_scores(torch.tensor(scores), torch.tensor([9]), config)
    literal = literal_statistics(scores[0], 4096, "zero" if preset == "torch-2024-10" else "heads")
    assert [getattr(statistics, name).item() for name in ATTENTION] == pytest.approx(literal, rel=1e-11)
    assert statistics.attention_entropy.item() > 11.9  # whatever the text: D2


@PROPERTY
@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=5), fidelities, st.sampled_from([NAN, INF, -INF, 1e38]))
def test_garbage_beyond_a_rows_length_is_ignored(seed, lengths, fidelity, garbage):
    config = EntropixConfig.preset(fidelity=fidelity)
    scores = torch.tensor(np.random.default_rng(seed).normal(size=(len(lengths), 3, 16)))
    lengths = torch.tensor(lengths)
    beyond = (torch.arange(16) >= lengths.unsqueeze(-1)).unsqueeze(1).expand_as(scores)
    clean = AttentionStatistics.from_scores(scores.masked_fill(beyond, 0.0), lengths, config)
    dirty = AttentionStatistics.from_scores(scores.masked_fill(beyond, garbage), lengths, config)
    for name in ATTENTION:
        same(getattr(clean, name), getattr(dirty, name), name)
        assert torch.isfinite(getattr(clean, name)).all(), name


@PROPERTY
@given(seeds, st.integers(1, 20), st.integers(1, 5))
def test_a_sink_takes_weight_without_being_a_position(seed, length, heads):
    rng = np.random.default_rng(seed)
    scores, sinks = rng.normal(size=(heads, length)) * 3, rng.normal(size=heads) * 3
    statistics = HeadStatistics.from_scores(torch.tensor(scores[None]), torch.tensor([length]), sinks=torch.tensor(sinks))
    weights = scipy.special.softmax(np.concatenate([scores, sinks[:, None]], axis=1), axis=1)[:, :-1]
    np.testing.assert_allclose(statistics.weights[0], weights, rtol=1e-10)
    np.testing.assert_allclose(statistics.entropy[0], scipy.special.entr(weights).sum(axis=1) / math.log(2), rtol=1e-9)
    assert statistics.counted.tolist() == [length]


def test_the_mean_over_layers_is_taken_of_each_statistic():
    layers = random_statistics(6, 6)
    stacked = AttentionStatistics(*(getattr(layers, name).view(3, 2) for name in ATTENTION)).mean_over_layers()
    for name in ATTENTION:
        values = getattr(layers, name).tolist()
        expected = [(values[row] + values[row + 2] + values[row + 4]) / 3 for row in (0, 1)]
        assert getattr(stacked, name).tolist() == pytest.approx(expected), name


@PROPERTY
@given(seeds, st.lists(st.booleans(), min_size=1, max_size=6), fidelities, st.sampled_from([0.0, 5.0, NAN, INF]))
def test_rows_that_were_not_measured_run_on_the_logits_alone(seed, measured, fidelity, filler):
    rows, mask = len(measured), torch.tensor(measured)
    logits, full = random_logits(seed, rows, 80), random_statistics(seed, rows)
    partial = AttentionStatistics(*(torch.where(mask, getattr(full, name), filler) for name in ATTENTION), measured=mask)
    entropix = sampler(fidelity=fidelity)
    decision, attended, alone = (entropix.decide(logits, statistics) for statistics in (partial, full, None))
    assert_same_decision(decision, entropix.decide(logits[mask], select(full, mask)), mask)
    assert_same_decision(decision, entropix.decide(logits[~mask]), ~mask)
    for name in ATTENTION:
        assert getattr(alone.metrics, name).isnan().all()
        same(getattr(decision.metrics, name).isnan(), ~mask)
    same(attended.regime, alone.regime, "attention has no say in the regime")


def test_a_callable_is_given_the_regimes_once():
    logits, statistics = random_logits(5, 6, 200), random_statistics(5, 6)
    calls = []

    def measure(regime):
        calls.append(regime.clone())
        return statistics

    decision = sampler().decide(logits, measure)
    assert len(calls) == 1
    same(calls[0], decision.regime)
    assert_same_decision(decision, sampler().decide(logits, statistics), slice(None))
    assert_same_decision(sampler().decide(logits, lambda regime: None), sampler().decide(logits), slice(None))


# --- regimes and parameters, written a second time from SEMANTICS 2 and 3 -----------------------------------------------


def literal_regime(preset: str, ent: float, vent: float, number=float) -> str:
    """The table of SEMANTICS 2; ``number`` rounds a threshold to the type that is compared."""
    helv, hehv = {"torch-2024-10": (3.0, 5.0), "jax-2024-10": (5.0, 3.0)}[preset]
    if not (math.isfinite(ent) and math.isfinite(vent)):
        return "ADAPTIVE"
    if ent < number(0.1) and vent < number(0.1):
        return "LELV"
    if ent > helv and vent < number(0.1):
        return "HELV"
    if ent < 5.0 and vent > 5.0:
        return "LEHV"
    if ent > hehv and vent > 5.0:
        return "HEHV"
    return "ADAPTIVE"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", PRESETS)
def test_regime_borders(preset, dtype):
    number = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    borders = [
        float(value)
        for border in map(number, (0.1, 3.0, 5.0))
        for value in (np.nextafter(border, number(0)), border, np.nextafter(border, number(9)))
    ]
    points = list(itertools.product([0.0, *borders, 4.0, 20.0, INF, NAN], repeat=2))
    entropy, varentropy = (torch.tensor(column, dtype=dtype) for column in zip(*points, strict=True))
    found = classify(entropy, varentropy, Constants.from_config(EntropixConfig.preset(preset), dtype, "cpu"))
    expected = [literal_regime(preset, *point, number) for point in points]
    assert [Regime(regime).name for regime in found.tolist()] == expected
    assert set(expected) == {regime.name for regime in Regime}


@pytest.mark.parametrize(
    ("preset", "ent", "vent", "regime"),
    [
        ("jax-2024-10", 4.0, 0.0, "ADAPTIVE"),
        ("torch-2024-10", 4.0, 0.0, "HELV"),
        ("jax-2024-10", 4.0, 6.0, "LEHV"),  # matches HEHV too, which is tested later
        ("torch-2024-10", 4.0, 6.0, "LEHV"),
        ("jax-2024-10", 5.0, 6.0, "HEHV"),
        ("torch-2024-10", 5.0, 6.0, "ADAPTIVE"),
        ("jax-2024-10", 1.0, 0.0, "ADAPTIVE"),  # D25: a fair coin
    ],
)
def test_regimes_of_well_known_points(preset, ent, vent, regime):
    constants = Constants.from_config(EntropixConfig.preset(preset), torch.float64, "cpu")
    found = classify(*(torch.tensor([value], dtype=torch.float64) for value in (ent, vent)), constants)
    assert Regime(found.item()).name == regime == literal_regime(preset, ent, vent)


def literal_parameters(preset, fidelity, regime, ent, vent, attn_ent, attn_vent, agreement, interaction) -> dict:
    """The table of SEMANTICS 3, one row at a time; top_k before trunc or round."""
    t0, p0, k0 = 0.666, 0.90, 27
    min_p = 0.03 if preset == "jax-2024-10" else 0.0
    if regime == "LELV":
        return {"temperature": 0.0, "top_p": 1.0, "top_k": 1.0, "min_p": 0.0, "samples": 1}
    if regime == "HELV":
        temperature = min(1.5, t0 * (1.3 + 0.2 * attn_ent))
        return {"temperature": temperature, "top_p": p0, "top_k": k0, "min_p": min_p, "samples": 1}
    if regime == "LEHV":
        temperature = min(1.5, t0 * (1.2 + 0.3 * interaction))
        top_k = max(5, k0 * (1 + 0.5 * (1 - agreement)))
        return {"temperature": temperature, "top_p": p0, "top_k": top_k, "min_p": min_p, "samples": 1}
    if regime == "HEHV":
        temperature = max(2.0, t0 * (2.0 + 0.5 * attn_vent))
        return {"temperature": temperature, "top_p": max(0.5, p0 - 0.2 * attn_ent), "top_k": k0, "min_p": min_p, "samples": 1}
    temperature = t0 * (1 + 0.3 * (ent + vent) + 0.2 * (attn_ent + attn_vent) - 0.2 * agreement)
    if fidelity == "corrected":
        temperature = min(2.0, temperature)  # D14
    return {
        "temperature": temperature,
        "top_p": min(1.0, max(0.1, p0 * (1 + 0.1 * attn_vent))),
        "top_k": min(100, max(1, k0 * (1 + 0.3 * interaction - 0.2 * agreement))),
        "min_p": min(0.5, max(0.01, 0.03 * (1 - 0.5 * (ent + vent)))),
        "samples": 5,
    }


metric_rows = st.tuples(
    st.one_of(st.floats(0, 17), st.floats(0, 0.1), st.floats(3, 5)),
    st.one_of(st.floats(0, 60), st.floats(0, 0.1)),
    st.floats(0, 14),
    st.floats(0, 20),
    st.one_of(st.floats(0, 0.1), st.floats(0, 4)),
    st.one_of(st.floats(0, 2), st.floats(0, 30)),
)


@settings(PROPERTY, max_examples=200)
@given(presets, fidelities, st.lists(metric_rows, min_size=1, max_size=6))
def test_parameters_are_those_of_the_table(preset, fidelity, rows):
    config = EntropixConfig.preset(preset, fidelity=fidelity)
    statistics = AttentionStatistics(*torch.tensor([row[2:] for row in rows], dtype=torch.float64).T)
    chosen, regime, score = decide_parameters(config, [row[:2] for row in rows], statistics)
    for index, row in enumerate(rows):
        name = literal_regime(preset, *row[:2])
        assert Regime(regime[index].item()).name == name
        expected = literal_parameters(preset, fidelity, name, *row)
        # Within rounding of a step, either side is right.
        top_k = expected.pop("top_k")
        if name == "LEHV":
            assume(abs(top_k - round(top_k)) > 1e-9 or top_k in (5, 27, 40.5))
            assert chosen.top_k[index].item() == math.trunc(top_k)
        else:
            assume(abs(top_k % 1 - 0.5) > 1e-9)
            assert chosen.top_k[index].item() == round(top_k)
        for parameter, value in expected.items():
            assert getattr(chosen, parameter)[index].item() == pytest.approx(value, rel=1e-12, abs=1e-15), (name, parameter)
        ent, vent, attn_ent, attn_vent, agreement, interaction = row
        c = (1 - ent) * 0.1 + (1 - attn_ent) * 0.2 + (1 - vent) * 0.3 + (1 - attn_vent) * 0.4
        assert score[index].item() == pytest.approx(c + agreement * 0.5 + interaction * 0.6, rel=1e-11, abs=1e-11)


@PROPERTY
@given(st.floats(0, 10), st.lists(metric_rows, min_size=1, max_size=6))
def test_adaptives_temperature_starts_at_its_offset(offset, rows):
    config = EntropixConfig.preset(adaptive={"temperature_offset": offset, "temperature_max": 100})
    statistics = AttentionStatistics(*torch.tensor([row[2:] for row in rows], dtype=torch.float64).T)
    points = [row[:2] for row in rows]
    chosen, regime, _ = decide_parameters(config, points, statistics)
    published, _, _ = decide_parameters(EntropixConfig.preset(), points, statistics)
    for index, (ent, vent, attn_ent, attn_vent, agreement, _) in enumerate(rows):
        factor = offset + 0.3 * (ent + vent) + 0.2 * (attn_ent + attn_vent) - 0.2 * agreement
        assume(abs(factor) > 1e-9)
        expected = min(100, 0.666 * factor) if factor > 0 else 0.666
        if regime[index] != Regime.ADAPTIVE:
            expected = published.temperature[index].item()
        assert chosen.temperature[index].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("interaction", "top_k"), [(1.0, 2), (3.0, 2), (5.0, 4), (7.0, 4)])
def test_adaptive_top_k_rounds_half_to_even(interaction, top_k):
    config = EntropixConfig.preset(base={"top_k": 1}, adaptive={"top_k_interaction": 0.5})
    statistics = AttentionStatistics(*(torch.tensor([value]) for value in (0.0, 0.0, 0.0, interaction)))
    assert decide_parameters(config, [ADAPTIVE], statistics)[0].top_k.item() == top_k


def test_each_row_can_have_its_own_constants():
    configs = [EntropixConfig.preset(preset) for preset in PRESETS]
    columns = Constants.from_config(configs[0], torch.float64, "cpu").columns
    values = torch.cat([Constants.from_config(config, torch.float64, "cpu").values for config in configs])
    logits = torch.zeros(2, 16, dtype=torch.float64)  # 4 bits, varentropy 0: between the presets' borders of HELV
    decision = EntropixSampler(configs[0]).decide(logits, constants=Constants(values, columns))
    assert [Regime(regime).name for regime in decision.regime.tolist()] == ["ADAPTIVE", "HELV"]
    for row, config in enumerate(configs):
        assert_same_decision(decision, EntropixSampler(config).decide(logits[[row]]), [row])
