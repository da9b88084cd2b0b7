"""top-nσ, by its definition."""

import numpy as np
import pytest
import torch

from tests.samplers.drawn import drawn, logits_of

TENTHS = [0.1, 0.2, 0.3, 0.4]


def defined(logits, temperature, n):
    """Keep l ≥ max - n·σ, with the population σ of the finite logits; n ≤ 0 keeps all."""
    logits = np.float64(logits)
    if n > 0:
        logits = np.where(logits >= logits.max() - n * logits[np.isfinite(logits)].std(), logits, -np.inf)
    p = np.exp(logits / temperature - logits.max() / temperature)
    return p / p.sum()


@pytest.mark.parametrize(("n", "expected"), [(1.0, [0, 0, 3 / 7, 4 / 7]), (0.0, TENTHS), (3.0, TENTHS), (-1.0, TENTHS)])
def test_published_numbers(n, expected):
    assert drawn("top_n_sigma", logits_of(*TENTHS), top_n_sigma=n)[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("n", [-1.0, 0.3, 1.0, 2.5])
def test_it_is_its_definition(temperature, n):
    logits = np.random.default_rng(2).normal(size=(20, 200)) * 2
    logits[::3, ::2] = -np.inf
    expected = np.stack([defined(row, temperature, n) for row in logits])
    torch.testing.assert_close(
        drawn("top_n_sigma", logits, temperature, top_n_sigma=n), torch.from_numpy(expected), rtol=1e-4, atol=1e-6
    )


def test_the_higher_floor_holds():
    """The request's own min_p, where it drops more."""
    logits = logits_of(*TENTHS)
    assert drawn("top_n_sigma", logits, min_p=0.76, top_n_sigma=1.0)[0].tolist() == [0, 0, 0, 1]
    assert drawn("top_n_sigma", logits, min_p=0.24, top_n_sigma=1.0)[0].tolist() == pytest.approx([0, 0, 3 / 7, 4 / 7])
