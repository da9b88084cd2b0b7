"""The port against published behaviour: float64 cases computed with the executed original."""

import json
from pathlib import Path

import pytest
import torch

from vllm_entropix import EntropixConfig
from vllm_entropix.distribution import filters
from vllm_entropix.sampling import AttentionStatistics, EntropixSampler, Parameters, Regime

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
PRESETS = ("jax-2024-10", "torch-2024-10")
DECISIONS = [(name, preset) for name, case in CASES.items() for preset in PRESETS if preset in case]
# (case, preset or None) that list parameters: argmax and forced tokens have none.
FILTERS = [
    (name, preset)
    for name, case in CASES.items()
    for preset in (None, *PRESETS)
    if "temperature" in (case if preset is None else case.get(preset, {}))
]
METRICS = {
    "entropy": "logits_entropy",
    "varentropy": "logits_varentropy",
    "attention_entropy": "attn_entropy",
    "attention_varentropy": "attn_varentropy",
    "agreement": "agreement",
    "interaction_strength": "interaction_strength",
}


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-9)


def decide(case: dict, config: EntropixConfig):
    scores = torch.tensor([case["attention_scores"]], dtype=torch.float64)
    lengths = torch.tensor([scores.shape[-1]])
    if "pad_to" not in case:
        # The original's cache was exactly as long as this context.
        original = config.original.model_copy(update={"padded_positions": scores.shape[-1]})
        config = config.model_copy(update={"original": original})
    else:
        assert config.original.padded_positions == case["pad_to"]
    statistics = AttentionStatistics.from_scores(scores, lengths, config)
    return EntropixSampler(config).decide(torch.tensor([case["logits"]], dtype=torch.float64), statistics)


def assert_kept(distribution, expected: list) -> None:
    ids, probabilities = distribution
    kept = [(i, p) for i, p in zip(ids[0].tolist(), probabilities[0].tolist(), strict=True) if p > 0]
    # One case's list ends before its tail of 1e-26.
    kept, rest = kept[: len(expected)], kept[len(expected) :]
    assert [i for i, _ in kept] == [i for i, _ in expected]
    assert [p for _, p in kept] == [near(p) for _, p in expected]
    assert sum(p for _, p in rest) < 1e-20


@pytest.mark.parametrize(("name", "preset"), DECISIONS)
def test_original(name, preset):
    case, expected = CASES[name], CASES[name][preset]
    decision = decide(case, EntropixConfig.preset(preset, fidelity="original"))
    for metric, golden in METRICS.items():
        value = case["metrics_original"][golden]
        if metric == "attention_varentropy" and preset == "torch-2024-10":
            value = 0.0  # over an axis of size 1
        assert getattr(decision.metrics, metric).item() == near(value), metric
    assert Regime(decision.regime.item()).name == expected["regime"]
    for parameter in ("temperature", "top_p", "top_k", "min_p", "confidence"):
        if parameter in expected:
            assert getattr(decision, parameter).item() == near(expected[parameter]), parameter
    if "kept_original" in expected:
        assert_kept(decision.distribution(best_of_n=False), expected["kept_original"])
    assert decision.parameters.samples.item() == expected.get("n", 1)


@pytest.mark.parametrize("name", [name for name in CASES if "metrics_real_positions" in CASES[name]])
def test_corrected_metrics(name):
    decision = decide(CASES[name], EntropixConfig.preset("jax-2024-10"))
    for metric, golden in METRICS.items():
        assert getattr(decision.metrics, metric).item() == near(CASES[name]["metrics_real_positions"][golden]), metric


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
@pytest.mark.parametrize(("name", "preset"), FILTERS)
def test_filters_with_listed_parameters(name, preset, fidelity):
    case = CASES[name]
    listed = case if preset is None else case[preset]
    parameters = Parameters(
        temperature=torch.tensor([listed["temperature"]], dtype=torch.float64),
        top_p=torch.tensor([listed["top_p"]], dtype=torch.float64),
        top_k=torch.tensor([listed["top_k"]]),
        min_p=torch.tensor([listed["min_p"]], dtype=torch.float64),
        samples=torch.tensor([1]),
    )
    logits = torch.tensor([case["logits"]], dtype=torch.float64)
    kept = filters.candidates(logits, listed["top_k"])
    normaliser = filters.log_normaliser_at(logits, parameters.temperature)
    probabilities = filters.filtered(kept, parameters, fidelity, normaliser)
    assert_kept(filters.compact(kept, probabilities), listed[f"kept_{fidelity}"])


def test_argmax_keeps_one_token():
    decision = decide(CASES["lelv"], EntropixConfig.preset("jax-2024-10"))
    assert_kept(decision.distribution(), [[17, 1.0]])
    assert (decision.temperature.item(), decision.top_k.item()) == (0.0, 1)


def test_corrected_caps_the_adaptive_temperature():
    decision = decide(CASES["adaptive"], EntropixConfig.preset("jax-2024-10"))
    assert CASES["adaptive"]["jax-2024-10"]["temperature"] > 2.0
    assert decision.temperature.item() == 2.0
