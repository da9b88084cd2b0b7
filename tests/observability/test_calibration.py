"""Borders from target shares, parameters that are neutral, halves that agree, and a file that a server takes."""

import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_entropix.observability import neutral
from vllm_entropix.observability.calibration import (
    DEFAULT_SHARES,
    NO_HELV,
    Measured,
    calibrate,
    corrected,
    doubts,
    half,
    parse_shares,
    preset_text,
    propose,
    regimes_of,
)
from vllm_entropix.observability.hints import never_forced
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError
from vllm_entropix.settings.server import Clarification

PARAMETERS = {"helv", "lehv", "hehv", "adaptive"}


def distributions(tokens, seed, sure=0.8):
    """Entropies and varentropies of softmaxes of many temperatures; in a part of them one token stands out."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(tokens, 256)) * np.exp(generator.normal(0.6, 1.0, (tokens, 1)))
    logits[:, 0] += generator.exponential(20, tokens) * (generator.random(tokens) < sure)
    logits -= logits.max(1, keepdims=True)
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    information = -np.log2(np.maximum(p, 1e-300))
    entropy = (p * information).sum(1)
    return Measured(entropy, (p * (information - entropy[:, None]) ** 2).sum(1))


def got(measured, thresholds):
    config = EntropixConfig().model_copy(update={"thresholds": thresholds})
    counts = np.bincount(regimes_of(measured, config), minlength=len(REGIMES))
    return dict(zip(REGIMES, counts / counts.sum(), strict=True))


@pytest.mark.parametrize(
    "shares",
    [DEFAULT_SHARES, {"LELV": 0.6, "HELV": 0.002, "LEHV": 0.05, "HEHV": 0.01}, dict.fromkeys(DEFAULT_SHARES, 0.05)],
)
def test_each_regime_gets_its_share(shares):
    measured = distributions(5000, 0)
    found = got(measured, propose(measured, shares))
    for regime, share in shares.items():
        assert found[regime] == pytest.approx(share, abs=0.001), regime


def test_what_is_high_is_never_sure():
    measured = distributions(5000, 0, sure=0.1)
    thresholds = propose(measured, {**DEFAULT_SHARES, "LELV": 0.8})
    assert thresholds.lelv.entropy_below == thresholds.helv.entropy_above
    assert got(measured, thresholds)["LELV"] < 0.75


def test_where_too_few_are_evenly_lost_helv_takes_all_there_are():
    measured = distributions(5000, 0)
    thresholds = propose(measured, {"LELV": 0.1, "HELV": 0.75, "LEHV": 0.05, "HEHV": 0.05})
    found = got(measured, thresholds)
    assert 0.1 < found["HELV"] < 0.74
    assert thresholds.helv.varentropy_below == pytest.approx(0.75 * thresholds.lehv.varentropy_above)
    assert found["LEHV"] == pytest.approx(0.05, abs=0.001)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1e-6, 0.5, 1.0, 3.0]) | st.floats(0, 17), st.floats(0, 60)), min_size=3, max_size=60
    ),
    st.lists(st.floats(0.01, 0.24), min_size=4, max_size=4),
)
def test_any_tokens_give_thresholds_in_range(points, shares):
    points = np.array(points)
    try:
        thresholds = propose(Measured(points[:, 0], points[:, 1]), dict(zip(DEFAULT_SHARES, shares, strict=True)))
    except ConfigError:  # they are too much alike
        assert min(len(np.unique(values)) for values in points.T) < len(points)
        return
    high_entropy, high_varentropy = thresholds.hehv.entropy_above, thresholds.hehv.varentropy_above
    assert max(thresholds.helv.varentropy_below, thresholds.lelv.varentropy_below) <= high_varentropy
    assert thresholds.lelv.entropy_below <= high_entropy
    assert thresholds.helv.entropy_above in (high_entropy, NO_HELV["entropy_above"])
    assert thresholds.lehv.entropy_below == thresholds.hehv.entropy_above
    EntropixConfig.from_dict({"thresholds": thresholds.model_dump()})


def test_halves_are_of_prompts_and_agree():
    prompts = [distributions(60, seed) for seed in range(80)]
    found = calibrate(prompts, DEFAULT_SHARES, EntropixConfig())
    assert sorted([*found.split[0], *found.split[1]]) == list(range(80))
    for part in (found.fitting, found.checking):
        assert (part.prompts, part.tokens) == (40, 2400)
    assert sum(found.targets.values()) == pytest.approx(1)
    for regime in REGIMES:
        assert found.fitting.shares[regime].value == pytest.approx(found.targets[regime], abs=0.002)
        check = found.checking.shares[regime]
        assert check.low <= check.value <= check.high
        assert abs(check.value - found.targets[regime]) < 0.03
    assert found == calibrate(prompts, DEFAULT_SHARES, EntropixConfig())


def test_either_half_is_like_all_prompts():
    """One prompt in four is answered with much that is unsure."""
    prompts = [distributions(60, seed, sure=0.2 if seed % 4 == 0 else 0.95) for seed in range(80)]
    for seed in range(5):
        split = calibrate(prompts, DEFAULT_SHARES, EntropixConfig(), seed).split
        assert [sum(place % 4 == 0 for place in half) for half in split] == [10, 10]


def test_intervals_know_that_tokens_of_a_prompt_are_alike():
    """Prompts that are all sure or all lost leave a wider interval than the same tokens shuffled."""
    alike = [Measured(np.full(50, v) + np.arange(50) * 1e-6, np.full(50, v) + np.arange(50) * 1e-6) for v in (0.01, 9.0) * 20]
    tokens = Measured.joined(alike)
    order = np.random.default_rng(0).permutation(len(tokens)).reshape(40, 50)
    mixed = [Measured(tokens.entropy[rows], tokens.varentropy[rows]) for rows in order]

    def width(prompts):
        share = calibrate(prompts, DEFAULT_SHARES, EntropixConfig()).checking.shares["LELV"]
        return share.high - share.low

    assert width(alike) > 2 * width(mixed)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [([], "two prompts"), ([distributions(500, 0)], "two prompts"), ([distributions(9, 0)] * 4, "200 tokens")],
)
def test_too_little_is_refused(prompts, words):
    with pytest.raises(ConfigError, match=words):
        calibrate(prompts, DEFAULT_SHARES, EntropixConfig())


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({}, []),
        ({"LELV": 0.1}, ["LELV ends at", "larger share"]),
        ({"LELV": 0.85, "LEHV": 0.02}, ["LELV reaches to", "smaller share"]),
        ({"LELV": 0.1, "LEHV": 0.5, "HEHV": 0.2}, ["LEHV and HEHV begin at", "hardly fork"]),
        ({"LELV": 0.05, "HELV": 0.8}, ["HELV gets", "no more such tokens"]),
        ({"HELV": 0.001}, ["HELV rests on", "more prompts"]),
    ],
)
def test_a_proposal_that_makes_little_sense_is_doubted(shares, words):
    prompts = [distributions(60, seed) for seed in range(80)]
    said = " ".join(doubts(calibrate(prompts, {**DEFAULT_SHARES, **shares}, EntropixConfig())))
    assert [word for word in words if word not in said] == []
    assert bool(said) == bool(words)


@pytest.mark.parametrize("strength", [neutral.COOL, 1.0, neutral.WARM, 2.0])
@pytest.mark.parametrize("base", [{}, {"temperature": 1.7, "top_p": 0.05, "top_k": 1}])
def test_the_mean_temperature_is_the_base_temperature(base, strength):
    prompts = [distributions(60, seed) for seed in range(80)]
    found = calibrate(prompts, DEFAULT_SHARES, EntropixConfig.preset(base=base), strength=strength)
    assert found.fitting.temperature.value == pytest.approx(1, abs=1e-4)
    for part in (found.fitting, found.checking):
        assert abs(part.temperature.value - 1) < 0.02
        assert part.temperature.low <= part.temperature.value <= part.temperature.high
        assert set(part.clamped.values()) == {0.0}
    numbers = dict(found.config.numbers())
    adaptive = [numbers[f"adaptive.temperature_{name}"] for name in ("offset", "logits")]
    # No token that there can be is drawn at 0 or below, where the base would be taken.
    for metrics in (0, 20 + numbers["thresholds.hehv.varentropy_above"]):
        assert adaptive[0] + adaptive[1] * metrics > 0.1
    warmer = (strength > 1) - (strength < 1)
    assert np.sign(adaptive[1]) == warmer
    assert np.sign(numbers["hehv.temperature_offset"] - numbers["lehv.temperature_offset"]) == warmer


def test_published_constants_are_hot_and_stand_on_their_clamps():
    told = half([distributions(60, seed) for seed in range(40)], EntropixConfig(), 0)
    assert told.temperature.low > 1.1
    assert told.clamped["ADAPTIVE"] > 0.5


def test_a_second_run_corrects_what_the_first_found():
    prompts = [distributions(60, seed) for seed in range(80)]
    found = calibrate(prompts, DEFAULT_SHARES, EntropixConfig())
    # Drawn with what was found, texts have become less sure.
    again = [Measured(part.entropy * 1.3, part.varentropy * 1.3) for part in prompts]
    before = half([again[place] for place in found.split[1]], found.config, 0)
    after = corrected(found, again)
    assert abs(before.temperature.value - 1) > 0.02
    for part in (after.fitting, after.checking):
        assert abs(part.temperature.value - 1) < 0.02
    assert half(again, after.config, 0).temperature.value == pytest.approx(1, abs=1e-4)
    assert after.config.thresholds == found.config.thresholds
    assert after.with_regimes
    with pytest.raises(ConfigError, match="one has 0"):
        corrected(found, [Measured(np.empty(0), np.empty(0))] * 80)


def test_a_model_without_helv_is_said_to_have_none():
    def uneven(seed):
        drawn = distributions(60, seed)
        return Measured(drawn.entropy, np.where(drawn.entropy > 3, np.maximum(drawn.varentropy, 6), drawn.varentropy))

    found = calibrate([uneven(seed) for seed in range(80)], DEFAULT_SHARES, EntropixConfig())
    assert not found.has_helv
    assert found.fitting.shares["HELV"].value == found.checking.shares["HELV"].value == 0
    said = " ".join(doubts(found))
    assert "no HELV: above" in said
    assert "HELV gets" not in said
    assert never_forced(found.config.model_copy(update={"clarification": Clarification(text="hm?")}), 50_000) is not None


def test_shares_as_users_write_them():
    assert parse_shares(None) == DEFAULT_SHARES
    assert parse_shares("lelv=0.5, HEHV=0.01") == {**DEFAULT_SHARES, "LELV": 0.5, "HEHV": 0.01}
    for text in ("LELV", "LELV=", "LELV=0", "LELV=1.5", "LELV=nan", "ADAPTIVE=0.5", "x=0.1"):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            parse_shares(text)
    with pytest.raises(ConfigError, match="more than 1"):
        parse_shares("LELV=0.9,LEHV=0.2")


@pytest.mark.parametrize("base", [EntropixConfig(), EntropixConfig.preset("torch-2024-10", fidelity="original")])
def test_the_file_is_a_configuration(tmp_path, base):
    found = calibrate([distributions(60, seed) for seed in range(20)], DEFAULT_SHARES, base)
    path = tmp_path / "preset.toml"
    path.write_text(preset_text(found, base, "some model"))
    assert EntropixConfig.from_file(path) == found.config
    assert set(tomllib.loads(path.read_text())) <= {"preset", "fidelity", "thresholds", *PARAMETERS}


@pytest.mark.parametrize("name", ["a\nb", 'x = 1 # "]', "[/red]", "\x00\x1b[2J\u2028", "\U0001f98a", "\udcff"])
def test_a_models_name_changes_no_setting(tmp_path, name):
    found = calibrate([distributions(60, seed) for seed in range(20)], DEFAULT_SHARES, EntropixConfig())
    path = tmp_path / "preset.toml"
    path.write_text(preset_text(found, EntropixConfig(), name, notes=(name,)), encoding="utf-8", errors="replace")
    assert EntropixConfig.from_file(path) == found.config
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))) == {"preset", "thresholds", *PARAMETERS}
