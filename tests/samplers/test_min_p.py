"""min_p, by its definition."""

import numpy as np
import pytest
import torch

from tests.samplers.drawn import drawn, logits_of

TENTHS = [0.1, 0.2, 0.3, 0.4]
THREE, TWO, ONE = [0, 2 / 9, 3 / 9, 4 / 9], [0, 0, 3 / 7, 4 / 7], [0, 0, 0, 1]


def defined(logits, temperature, min_p):
    """Keep p ≥ min_p · max p."""
    p = np.exp(np.float64(logits) / temperature)
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("min_p", "expected"),
    [(0.0, TENTHS), (0.24, TENTHS), (0.26, THREE), (0.49, THREE), (0.51, TWO), (0.74, TWO), (0.76, ONE), (1.0, ONE)],
)
def test_published_numbers(min_p, expected):
    assert drawn("min_p", logits_of(*TENTHS), min_p=min_p)[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.2])
def test_it_is_its_definition(temperature, min_p):
    logits = np.random.default_rng(1).normal(size=(20, 200)) * 2
    # A request that gives none gets the server's.
    expected = np.stack([defined(row, temperature, min_p or 0.05) for row in logits])
    torch.testing.assert_close(
        drawn("min_p", logits, temperature, min_p=min_p), torch.from_numpy(expected), rtol=1e-4, atol=1e-6
    )
