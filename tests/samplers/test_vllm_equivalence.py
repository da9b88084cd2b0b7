"""With the regimes off the distribution is vLLM's own for the same four parameters, and vLLM's draw from ours is exact."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vllm_entropix import EntropixConfig
from vllm_entropix.sampling import EntropixSampler, Regime

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p_pytorch

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())
LISTED = [
    pytest.param(case["logits"], listed, id=f"{case['name']}-{preset}")
    for case in GOLDEN["cases"]
    for preset in ("", "jax-2024-10", "torch-2024-10")
    if "kept_corrected" in (listed := case.get(preset, {}) if preset else case)
]


def min_p_masked(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """What vLLM's own min_p processor makes of the row ``logits [1, vocab]``."""
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1))
    processor = MinPLogitsProcessor(config, torch.device("cpu"), False)
    added = [(0, SamplingParams(min_p=min_p), None, [])]
    processor.update_state(BatchUpdate(batch_size=1, removed=[], added=added, moved=[]))
    return processor.apply(logits)


def vllm_distribution(logits: torch.Tensor, temperature: float, top_p: float, top_k: int, min_p: float) -> torch.Tensor:
    """vLLM's order: temperature, min_p, then top_k and top_p together; ``logits [1, vocab]``."""
    scaled = min_p_masked(logits.clone() / temperature, min_p)
    k = torch.tensor([min(top_k, logits.shape[-1])])
    masked = apply_top_k_top_p_pytorch(scaled, k, torch.tensor([top_p], dtype=logits.dtype))
    return masked.softmax(-1)


def our_distribution(logits: torch.Tensor, **base) -> torch.Tensor:
    ids, probabilities = EntropixSampler(EntropixConfig.preset(regimes=False, base=base)).decide(logits).distribution()
    return torch.zeros_like(logits, dtype=probabilities.dtype).scatter_add(-1, ids, probabilities)


def assume_clear_borders(logits: torch.Tensor, temperature: float, top_p: float, top_k: int, min_p: float, gap: float) -> None:
    """Leave out rows in which rounding decides whether a token is kept."""
    probabilities, _ = (logits.double() / temperature).softmax(-1).sort(descending=True)
    relative = probabilities / probabilities[:, :1]
    assume(not min_p or (relative - min_p).abs().min().item() > gap * min_p)
    kept = torch.where(relative >= min_p, probabilities, 0.0)[:, :top_k]
    before = (kept / kept.sum()).cumsum(-1)
    # At top_p 1 nothing is dropped but what rounding drops: vLLM loses a tail of less than an ulp of 1.
    assume((before - top_p).abs().min().item() > gap or top_p == 1)


@PROPERTY
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(1, 300),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    temperature=st.floats(0.2, 5),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    top_k=st.one_of(st.integers(1, 320), st.integers(1, 20)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-4, 1)),
)
def test_regimes_off_is_vllms_own_distribution(seed, vocabulary, scale, masked, dtype, temperature, top_p, top_k, min_p):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(1, vocabulary)) * scale, dtype=dtype)
    assume(len(set(logits[0].tolist())) == vocabulary)  # of tied tokens vLLM keeps all, entropix exactly top_k
    if masked:
        logits[0, 1::2] = -math.inf
    parameters = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    # vLLM holds min_p in float32 whatever the logits are.
    assume_clear_borders(logits, **parameters, gap=1e-5 if dtype == torch.float32 else 1e-7)
    ours, theirs = our_distribution(logits, **parameters), vllm_distribution(logits, **parameters)
    assert ours.dtype == theirs.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(ours, theirs, **tolerance)
    if top_p < 1:
        assert torch.equal(ours > 0, theirs > 0), "kept tokens"


@pytest.mark.parametrize(
    "parameters", [(0.666, 0.9, 27, 0.03), (1.0, 1.0, 50, 0.0), (1.5, 0.5, 1000, 0.1), (0.8, 0.95, 1, 0.0)]
)
def test_every_row_of_a_batch_is_vllms_own(parameters):
    parameters = dict(zip(("temperature", "top_p", "top_k", "min_p"), parameters, strict=True))
    logits = torch.tensor(np.random.default_rng(8).normal(size=(5, 1000)) * 3)
    ours = our_distribution(logits, **parameters)
    for row in range(5):
        torch.testing.assert_close(ours[[row]], vllm_distribution(logits[[row]], **parameters), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("logits", "listed"), LISTED)
def test_golden_lists_are_vllms_own(logits, listed):
    parameters = {name: listed[name] for name in ("temperature", "top_p", "top_k", "min_p")}
    theirs = vllm_distribution(torch.tensor([logits], dtype=torch.float64), **parameters)[0]
    expected = dict(listed["kept_corrected"])
    for token, probability in expected.items():
        assert theirs[token].item() == pytest.approx(probability, rel=1e-9, abs=1e-12), token
    # One case's list ends before its tail of 1e-26.
    rest = sum(probability for token, probability in enumerate(theirs.tolist()) if token not in expected)
    assert rest < 1e-12


# --- vLLM's draw ------------------------------------------------------------------------------------------------------

ROWS, VOCABULARY = 100_000, 97


def adaptive_log_probabilities() -> torch.Tensor:
    """What a step hands to vLLM: log-probabilities of a best-of-n distribution, -inf for all other tokens."""
    logits = torch.tensor(np.random.default_rng(9).normal(size=(1, VOCABULARY)) * 1.5, dtype=torch.float32)
    decision = EntropixSampler(EntropixConfig()).decide(logits)
    assert decision.regime.tolist() == [Regime.ADAPTIVE]
    ids, probabilities = decision.distribution()
    return torch.full((1, VOCABULARY), -math.inf).scatter(-1, ids, probabilities.log())


def assert_drawn_from(tokens: torch.Tensor, log_probabilities: torch.Tensor) -> None:
    counts = np.bincount(tokens.numpy(), minlength=VOCABULARY)
    probabilities = log_probabilities[0].double().exp().numpy()
    expected = probabilities / probabilities.sum() * len(tokens)
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    rare = expected < 10
    observed, expected = (np.append(cells[~rare], cells[rare].sum()) for cells in (counts, expected))
    filled = expected > 0
    assert filled.sum() > 5
    assert scipy.stats.chisquare(observed[filled], expected[filled]).pvalue > 1e-4


@pytest.fixture(params=["forward_native", "forward_cpu"])
def draw(request):
    """vLLM's draw from logits, given per-row generators."""
    if request.param == "forward_cpu":
        if not current_platform.is_cpu():
            pytest.skip("the fused draw is in vLLM's CPU build only")
        current_platform.import_kernels()
        assert hasattr(torch.ops._C, "fused_gumbel_argmax")
    sampler = TopKTopPSampler()
    forward = getattr(sampler, request.param)
    return lambda logits, generators: forward(logits, generators, None, None)[0]


def test_vllms_draw_from_log_probabilities_is_exact(draw):
    log_probabilities = adaptive_log_probabilities()
    torch.manual_seed(10)
    tokens = torch.cat([draw(log_probabilities.repeat(ROWS // 10, 1), {}) for _ in range(10)])
    assert_drawn_from(tokens, log_probabilities)


def test_vllms_seeded_draw_is_exact_and_repeatable(draw):
    log_probabilities = adaptive_log_probabilities()

    def tokens() -> torch.Tensor:
        generators = {row: torch.Generator().manual_seed(row) for row in range(ROWS // 5)}
        return draw(log_probabilities.repeat(ROWS // 5, 1), generators)

    first = tokens()
    assert_drawn_from(first, log_probabilities)
    assert torch.equal(first, tokens())


def test_vllm_draws_the_only_token_there_is(draw):
    forced = torch.full((50, VOCABULARY), -math.inf)
    forced[torch.arange(50), torch.arange(50)] = 0.0
    assert draw(forced, {}).tolist() == list(range(50))
