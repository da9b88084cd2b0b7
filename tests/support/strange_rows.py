"""Rows of logits as no healthy model gives them, and parameters at their edges, for hypothesis."""

import numpy as np
import torch
from hypothesis import strategies as st

from vllm_entropix.sampling import Parameters

INF = np.float32(np.inf)
# A NaN has a sign, which an order of bits would see.
NANS = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
DENORMAL = np.float32(1e-45)

# What a row is like before anything strange comes into it.
KINDS = ("normal", "peaked", "flat", "tied", "huge", "denormal", "low")
# What then becomes of some of its places.
FAULTS = ("masked", "all masked", "one allowed", "nan", "only nan allowed", "+inf", "all +inf", "nan and +inf", "one nan")
# Lengths at the edges of vector registers, of stretches, and of both kernels' blocks.
VOCABULARIES = (1, 2, 3, 5, 17, 63, 64, 65, 129, 1000, 2047, 2048, 2049, 4095, 4096, 4097)


def row(rng: np.random.Generator, kind: str, faults: list[str], vocabulary: int) -> np.ndarray:
    """float32 ``[vocabulary]``."""
    values = rng.normal(size=vocabulary).astype(np.float32)
    if kind == "peaked":
        values[rng.integers(vocabulary)] += 40
    elif kind == "flat":
        values[:] = rng.normal()
    elif kind == "tied":
        values = np.round(values * 3) / 2
    elif kind == "huge":
        values = np.float32(3e38) * np.sign(values)
    elif kind == "denormal":
        values = DENORMAL * np.round(values)
    elif kind == "low":
        values = np.float32(-3e38) - np.abs(values) * np.float32(1e36)
    for fault in faults:
        some = rng.integers(vocabulary, size=max(1, vocabulary // 50))
        if fault == "masked":
            values[rng.random(vocabulary) < rng.random()] = -INF
        elif fault == "all masked":
            values[:] = -INF
        elif fault == "one allowed":
            values[np.arange(vocabulary) != some[0]] = -INF
        elif fault == "nan":
            values[some] = rng.choice(NANS, size=len(some))
        elif fault == "one nan":
            values[some[0]] = rng.choice(NANS)
        elif fault == "only nan allowed":
            values[:] = -INF
            values[some] = rng.choice(NANS, size=len(some))
        elif fault == "+inf":
            values[some] = INF
        elif fault == "all +inf":
            values[:] = INF
        else:
            values[some] = np.where(rng.random(len(some)) < 0.5, INF, rng.choice(NANS, size=len(some)))
    return values


@st.composite
def logits(draw: st.DrawFn, vocabularies: tuple[int, ...] = VOCABULARIES, dtypes: tuple[torch.dtype, ...] = (torch.float32,)):
    """``[rows, vocabulary]``."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocabulary, dtype = draw(st.sampled_from(vocabularies)), draw(st.sampled_from(dtypes))
    kinds = draw(
        st.lists(st.tuples(st.sampled_from(KINDS), st.lists(st.sampled_from(FAULTS), max_size=2)), min_size=1, max_size=10)
    )
    return torch.from_numpy(np.stack([row(rng, kind, faults, vocabulary) for kind, faults in kinds])).to(dtype)


@st.composite
def parameters(
    draw: st.DrawFn, rows: int, top_ks: tuple[int, ...] = (1, 2, 5, 27, 40, 300), best_of: tuple[int, ...] = (1, 2, 5, 64)
):
    """Each row has its own; no ``top_p`` that a sum of equal shares would meet, where rounding decides."""

    def column(choices: tuple[float, ...]) -> torch.Tensor:
        return torch.tensor(draw(st.lists(st.sampled_from(choices), min_size=rows, max_size=rows)))

    return Parameters(
        temperature=column((0.0, 1e-30, 0.01, 0.666, 1.0, 1.5, 100.0)).float(),
        top_p=column((0.0, 1e-30, 0.3171, 0.9137, 1.0)).float(),
        top_k=column(top_ks).long(),
        min_p=column((0.0, 1e-30, 0.03, 0.3, 1.0)).float(),
        samples=column(best_of).long(),
    )


def attention(rng: np.random.Generator, rows: int) -> list[torch.Tensor]:
    """The four statistics of attention, some of them not finite, and which rows were measured."""
    values = rng.random((4, rows)) * [[10.0], [4.0], [0.3], [8.0]]
    strange = rng.random((4, rows)) < 0.1
    values[strange] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 0.0, 1e-45], size=int(strange.sum()))
    return [*torch.tensor(values, dtype=torch.float32), torch.from_numpy(rng.random(rows) < 0.7)]


def has_softmax(rows: torch.Tensor) -> torch.Tensor:
    """bool ``[rows]``: is the largest logit finite?"""
    return rows.amax(-1).isfinite() & ~rows.isnan().any(-1)


def assert_same_draws(got: torch.Tensor, want: torch.Tensor, rows: torch.Tensor) -> None:
    """Log-probabilities of ``rows`` agree, and are as ``sampling.filters`` says of those without a softmax."""
    rounding = 1e-4 if got.dtype == torch.float32 else 0.1
    strange, masked = ~has_softmax(rows), rows == -torch.inf
    for written in (got.float(), want.float()):
        assert not written.isnan().any()
        assert (written[masked & ~masked.all(-1, keepdim=True)] == -torch.inf).all()
        assert torch.equal(written[strange].argmax(-1), rows[strange].argmax(-1))
        assert (written[strange].exp().sum(-1) == 1).all()
        torch.testing.assert_close(written.exp().sum(-1), torch.ones(len(written)), rtol=rounding, atol=0)
    torch.testing.assert_close(got.exp(), want.exp(), rtol=2 * rounding, atol=2e-6)


def assert_same_attention(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal where finite, and finite in the same places."""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), (got, want)
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-4, atol=1e-4)
