"""Best-of-n in closed form against the n draws that it stands for (SEMANTICS 3)."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_entropix import EntropixConfig
from vllm_entropix.distribution.best_of_n import best_of_n
from vllm_entropix.sampling import Candidates, EntropixSampler, Regime

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
DRAWS = 200_000


def closed_form(logits: list[float], probabilities: list[float], samples: int) -> list[float]:
    kept = Candidates(torch.arange(len(logits)).unsqueeze(0), torch.tensor([logits], dtype=torch.float64))
    folded = best_of_n(kept, torch.tensor([probabilities], dtype=torch.float64), torch.tensor([samples]))
    return folded[0].tolist()


def enumerated(logits: list[float], probabilities: list[float], samples: int) -> list[float]:
    """All sequences of draws; of each, the candidate of highest raw log-probability, the first drawn of equal ones."""
    result = [0.0] * len(logits)
    for drawn in itertools.product(range(len(logits)), repeat=samples):
        # max() returns the first of equals, as the original's argmax over its candidates does.
        result[max(drawn, key=lambda token: logits[token])] += math.prod(probabilities[token] for token in drawn)
    return result


@PROPERTY
@given(
    # Few values, so that ties are common; weight 0 is a token that a filter dropped.
    st.lists(st.tuples(st.sampled_from([2.0, 1.0, 0.5, -3.0]), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_enumeration_of_all_draws(tokens, samples):
    tokens.sort(key=lambda token: -token[0])
    logits, weights = [logit for logit, _ in tokens], [weight for _, weight in tokens]
    if not any(weights):
        weights[0] = 1
    probabilities = [weight / sum(weights) for weight in weights]
    expected = enumerated(logits, probabilities, samples)
    assert closed_form(logits, probabilities, samples) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("samples", [2, 3, 5, 64])
def test_equally_probable_tokens_stay_equally_probable(samples):
    assert closed_form([1.0] * 4, [0.25] * 4, samples) == pytest.approx([0.25] * 4, abs=1e-15)


def test_one_draw_leaves_the_distribution_as_it_is():
    probabilities = [0.5, 0.3, 0.15, 0.05]
    assert closed_form([4.0, 3.0, 2.0, 1.0], probabilities, 1) == probabilities


def test_two_tokens_by_hand():
    # The second wins only if it is drawn five times.
    assert closed_form([1.0, 0.0], [0.6, 0.4], 5) == pytest.approx([1 - 0.4**5, 0.4**5], abs=1e-15)


def test_each_row_has_its_own_number_of_draws():
    kept = Candidates(torch.arange(2).repeat(3, 1), torch.tensor([[1.0, 0.0]] * 3))
    folded = best_of_n(kept, torch.full((3, 2), 0.5), torch.tensor([1, 2, 5]))
    assert folded[:, 1].tolist() == pytest.approx([0.5, 0.25, 1 / 32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tail_that_underflows_stays_a_distribution(dtype):
    logits = torch.tensor([[0.0, -30.0, -60.0, -60.0, -200.0]], dtype=dtype)
    kept = Candidates(torch.arange(5).unsqueeze(0), logits)
    folded = best_of_n(kept, logits.softmax(-1), torch.tensor([64]))
    assert torch.isfinite(folded).all()
    assert folded.sum().item() == pytest.approx(1.0)
    assert folded[0, 0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 5, 16])
def test_literal_draws(samples, tied, fidelity):
    rng = np.random.default_rng(100 * samples + tied)
    logits = torch.tensor(rng.uniform(-3, 3, size=(1, 40)), dtype=torch.float64)
    if tied:
        logits = logits.round()
    decision = EntropixSampler(EntropixConfig.preset(fidelity=fidelity, adaptive={"samples": samples})).decide(logits)
    assert decision.regime.tolist() == [Regime.ADAPTIVE]
    token_ids, filtered = (tensor[0].numpy() for tensor in decision.distribution(best_of_n=False))
    raw = logits.log_softmax(-1)[0].numpy()
    if tied:
        assert len(set(raw[token_ids].tolist())) < len(token_ids)

    drawn = rng.choice(token_ids, size=(DRAWS, samples), p=filtered / filtered.sum())
    best = raw[drawn].argmax(axis=1)  # the first drawn of equal ones
    counts = np.bincount(drawn[np.arange(DRAWS), best], minlength=40)

    ids, probabilities = (tensor[0].numpy() for tensor in decision.distribution())
    expected = np.bincount(ids, weights=probabilities, minlength=40) * DRAWS
    # Cells that hardly ever occur are put together: the statistic is χ² only for cells that are well filled.
    rare = expected < 10
    assert not counts[expected == 0].any()
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    filled = expected > 0
    assert scipy.stats.chisquare(observed[filled], expected[filled]).pvalue > 1e-4
