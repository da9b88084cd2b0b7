"""Borders and parameters for a model from its own entropies.

Each regime gets the share of the tokens that one asks for, and moves the temperature around the base temperature.

Regimes are rectangles in the entropy × varentropy plane, and the two metrics go together: both are near 0 where the model is
sure, and varentropy is large only at a middling entropy or above. So the borders can't be quantiles of one metric at a time.
They are found one after the other:

1. LEHV and HEHV: the varentropy above which their two shares lie together, and the entropy that parts them there. These two
   borders are what "high" means; no other regime reaches beyond them.
2. LELV: the entropy below which a little more than its share lies, and the varentropy that leaves out the most varied of those.
3. HELV: above the high entropy, the varentropy below which its share lies: three quarters of the high varentropy at most, which
   keeps it apart from HEHV. A model that has hardly any such tokens has no HELV, and this is said.

Parameters are those of ``neutral.py``. They are found on tokens that were drawn without regimes. Tokens that are drawn with
them are others, so a second run corrects all temperatures by one factor, and each half shows what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tomli_w
import torch

from vllm_entropix.distribution.constants import Constants
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.observability import neutral
from vllm_entropix.observability.terminal import printable
from vllm_entropix.records.regimes import REGIMES, Regime
from vllm_entropix.samplers.entropix.calibrations import SECTIONS
from vllm_entropix.samplers.entropix.parameters import parameters
from vllm_entropix.samplers.entropix.regimes import classify
from vllm_entropix.samplers.entropix.settings import EntropixConfig, Thresholds
from vllm_entropix.settings.errors import ConfigError

# A choice and no finding: sure in two of five tokens, asking and resampling rare. The rest is ADAPTIVE.
DEFAULT_SHARES: Mapping[str, float] = {"LELV": 0.40, "HELV": 0.01, "LEHV": 0.08, "HEHV": 0.03}
MIN_TOKENS = 200
RESAMPLES = 1000
# Borders and counts that are doubted: bits, bits, bits², tokens.
_CERTAIN, _OPEN, _VARIED, _FEW = 0.01, 2.0, 1.0, 20
# This part of the tokens of lowest entropy is LELV; the rest has too much varentropy.
_SURE = 0.95
# HELV's varentropy is at most this part of what is high, and it has at least this share of the tokens, or there is none.
_EVEN, _LEAST = 0.75, 0.002
# Where a border lies that no token reaches.
NO_HELV = {"entropy_above": 64.0, "varentropy_below": 0.0}
# How far the mean temperature may be from the base temperature, and the share of a regime's tokens that may meet a clamp.
NEUTRAL, CLAMPED = 0.02, 0.05
# Base temperatures that clamps are looked at: they are absolute, and a request may ask for any.
BASES = (0.3, 0.7, 1.0, 1.5)
_ALIKE = "the entropies of these tokens are too much alike to tell regimes apart; give more prompts, or other ones"


@dataclass(frozen=True)
class Measured:
    """Metrics of the tokens that were generated for one prompt.

    Attributes:
        entropy: bits, ``[tokens]``.
        varentropy: bits², ``[tokens]``.
    """

    entropy: np.ndarray
    varentropy: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Measured]) -> Measured:
        """All tokens of several prompts."""
        return cls(np.concatenate([p.entropy for p in parts]), np.concatenate([p.varentropy for p in parts]))

    def __len__(self) -> int:
        return len(self.entropy)


@dataclass(frozen=True)
class Share:
    """Share of a regime among tokens, and where it would lie in 95 % of draws of as many other prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Half:
    """What a configuration does to the tokens of half of the prompts.

    Attributes:
        prompts: number of prompts.
        tokens: number of tokens.
        shares: by regime.
        temperature: mean of the tokens that aren't argmax, relative to the base temperature.
        clamped: share of each regime's tokens that meet a clamp, at the base temperature at which it is largest.
    """

    prompts: int
    tokens: int
    shares: Mapping[str, Share]
    temperature: Share
    clamped: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        config: the base configuration with the borders and parameters that were found.
        targets: shares that were asked for, ADAPTIVE's included.
        strength: how far temperatures were asked to go from the base.
        fitting: of the prompts that the configuration was fitted to.
        checking: of the other prompts.
        split: places of the prompts of either half among all.
        high: entropy (bits) that parts high from low, and the lowest varentropy (bits²) above it.
        with_regimes: were the tokens drawn with what was found, and not without regimes?
    """

    config: EntropixConfig
    targets: Mapping[str, float]
    strength: float
    fitting: Half
    checking: Half
    split: tuple[tuple[int, ...], tuple[int, ...]]
    high: tuple[float, float]
    with_regimes: bool = False

    @property
    def thresholds(self) -> Thresholds:
        """The borders."""
        return self.config.thresholds

    @property
    def has_helv(self) -> bool:
        """Is there a HELV?"""
        return self.config.thresholds.helv.entropy_above < NO_HELV["entropy_above"]


def parse_shares(text: str | None) -> dict[str, float]:
    """Target shares such as ``LELV=0.5,HELV=0.02``; what isn't named keeps its default.

    Raises:
        ConfigError: an unknown regime, a share that is none, or no room left for ADAPTIVE.
    """
    shares = dict(DEFAULT_SHARES)
    for part in (text or "").split(","):
        name, equals, value = part.partition("=")
        if not part.strip():
            continue
        name = name.strip().upper()
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not equals or name not in shares or not 0 < share < 1:
            raise ConfigError(
                f"shares has {part.strip()!r}, but it should be like LELV=0.4, of {', '.join(shares)} and between 0 and 1"
            )
        shares[name] = share
    if sum(shares.values()) > 1:
        raise ConfigError(f"shares sum to {sum(shares.values()):g}, which is more than 1")
    return shares


def calibrate(
    prompts: Sequence[Measured],
    shares: Mapping[str, float],
    base: EntropixConfig,
    seed: int = 0,
    strength: float = neutral.WARM,
) -> Calibration:
    """Fit borders and parameters to half of the prompts, and check them on the other half.

    Halves are of prompts and not of tokens: tokens of one text are alike. Prompts whose answers are about as unsure are parted,
    so that either half is like all of them.

    Args:
        prompts: what was measured without regimes, by prompt.
        shares: target share of each regime but ADAPTIVE.
        base: the configuration whose borders and parameters are replaced.
        seed: of the split and of the intervals.
        strength: how far temperatures go from the base; see ``neutral.py``.

    Raises:
        ConfigError: there is too little to fit to.
    """
    usable = [place for place, part in enumerate(prompts) if len(part)]
    if len(usable) < 2:
        raise ConfigError("calibration needs two prompts with an answer or more: half of them fit, half of them check")
    split = _split(prompts, usable, seed)
    fitting = Measured.joined(_half(prompts, split[0], MIN_TOKENS))
    _half(prompts, split[1], MIN_TOKENS)
    thresholds = propose(fitting, shares)
    bordered = base.model_copy(update={"thresholds": thresholds})
    regimes = regimes_of(fitting, bordered)
    high = thresholds.hehv
    found = neutral.fit(fitting.entropy, fitting.varentropy, regimes, high.varentropy_above, strength)
    config = _changed(bordered, found)
    above = fitting.varentropy[fitting.entropy > high.entropy_above]
    return Calibration(
        config=config,
        targets={**shares, "ADAPTIVE": 1 - sum(shares.values())},
        strength=strength,
        fitting=half(_half(prompts, split[0]), config, seed),
        checking=half(_half(prompts, split[1]), config, seed),
        split=split,
        high=(high.entropy_above, float(above.min()) if len(above) else 0.0),
    )


def corrected(found: Calibration, again: Sequence[Measured], seed: int = 0) -> Calibration:
    """The same borders with temperatures that are neutral over tokens that were drawn with what was found.

    All prompts' tokens tell this one factor, which there is no overfitting of; borders are the fitting half's.

    Args:
        found: by :func:`calibrate`.
        again: what was measured of the same prompts, in the same order, under ``found.config``.
        seed: of the intervals.

    Raises:
        ConfigError: too few tokens were drawn.
    """
    fitting, checking = (_half(again, places, MIN_TOKENS) for places in found.split)
    mean = half([*fitting, *checking], found.config, seed).temperature.value
    sections = found.config.model_dump(include={"helv", "lehv", "hehv", "adaptive"})
    config = _changed(found.config, neutral.scaled(sections, 1 / mean))
    return replace(
        found, config=config, fitting=half(fitting, config, seed), checking=half(checking, config, seed), with_regimes=True
    )


def _split(prompts: Sequence[Measured], usable: Sequence[int], seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places of the usable prompts of either half: neighbours by what ADAPTIVE's temperature goes by are parted by lot."""
    order = sorted(usable, key=lambda place: float((prompts[place].entropy + prompts[place].varentropy).mean()))
    lots = np.random.default_rng(seed).integers(2, size=len(order) // 2).tolist()
    first = [order[2 * pair + lot] for pair, lot in enumerate(lots)] + order[2 * len(lots) :]
    second = [order[2 * pair + 1 - lot] for pair, lot in enumerate(lots)]
    return tuple(first), tuple(second)


def _half(prompts: Sequence[Measured], places: Sequence[int], least: int = 0) -> list[Measured]:
    """The prompts at these places that have tokens; ConfigError if these are fewer than ``least``."""
    parts = [prompts[place] for place in places if len(prompts[place])]
    tokens = sum(map(len, parts))
    if tokens < least:
        raise ConfigError(
            f"calibration needs {least} tokens or more in either half, but one has {tokens}; "
            "give more prompts, or let the answers be longer"
        )
    return parts


def _changed(config: EntropixConfig, sections: neutral.Sections) -> EntropixConfig:
    """A configuration with other values in some sections, validated."""
    update = {
        name: type(getattr(config, name)).model_validate({**getattr(config, name).model_dump(), **values})
        for name, values in sections.items()
    }
    return config.model_copy(update=update)


def half(prompts: Sequence[Measured], config: EntropixConfig, seed: int) -> Half:
    """What a configuration does to the tokens of these prompts."""
    generator = np.random.default_rng(seed)
    everything = Measured.joined(prompts)
    return Half(
        prompts=len(prompts),
        tokens=len(everything),
        shares=shares_of(prompts, config, generator),
        temperature=_mean_temperature(prompts, config, generator),
        clamped=_clamped(everything, config),
    )


def propose(measured: Measured, shares: Mapping[str, float]) -> Thresholds:
    """Borders that give each regime its share of these tokens, as far as there are such (see the module's text).

    Raises:
        ConfigError: the tokens are too much alike to be parted.
    """
    entropy, varentropy = measured.entropy, measured.varentropy
    total = len(measured)

    def number(share: float) -> int:
        return max(1, round(share * total))

    high_varentropy = _after(varentropy, total - number(shares["LEHV"] + shares["HEHV"]))
    varied = entropy[varentropy > high_varentropy]
    even = varentropy < high_varentropy
    if not len(varied) or not even.any():
        raise ConfigError(_ALIKE)
    forks = round(len(varied) * shares["LEHV"] / (shares["LEHV"] + shares["HEHV"]))
    high_entropy = _after(varied, max(forks, 1))

    sure = min(number(shares["LELV"]), int(even.sum()))
    lelv_entropy = min(_after(entropy[even], min(round(sure / _SURE), int(even.sum()))), high_entropy)
    surest = varentropy[even & (entropy < lelv_entropy)]
    lelv_varentropy = min(_after(surest, sure), high_varentropy) if sure < len(surest) else high_varentropy

    most = high_varentropy * _EVEN
    lost = varentropy[(varentropy < most) & (entropy > high_entropy)]
    wanted = number(shares["HELV"])
    helv = {"entropy_above": high_entropy, "varentropy_below": min(_after(lost, wanted), most) if wanted < len(lost) else most}
    if len(lost) < number(_LEAST):
        helv = NO_HELV
    return Thresholds.model_validate(
        {
            "lelv": {"entropy_below": lelv_entropy, "varentropy_below": lelv_varentropy},
            "helv": helv,
            "lehv": {"entropy_below": high_entropy, "varentropy_above": high_varentropy},
            "hehv": {"entropy_above": high_entropy, "varentropy_above": high_varentropy},
        }
    )


def doubts(found: Calibration) -> list[str]:
    """What speaks against a proposal, in sentences: shares can be asked for that make no sense for a model."""
    borders = found.thresholds
    said = []
    if borders.lelv.entropy_below < _CERTAIN:
        said.append(
            f"LELV ends at {borders.lelv.entropy_below:.2g} bits, and tokens beyond are as good as certain, too: "
            "ask for a larger share of LELV."
        )
    elif borders.lelv.entropy_below > _OPEN:
        said.append(
            f"LELV reaches to {borders.lelv.entropy_below:.2g} bits, where the most probable token is one of many: "
            "ask for a smaller share of LELV."
        )
    if borders.hehv.varentropy_above < _VARIED:
        said.append(
            f"LEHV and HEHV begin at a varentropy of {borders.hehv.varentropy_above:.2g} bits², where distributions "
            "hardly fork: ask for smaller shares of them."
        )
    if not found.has_helv:
        entropy, varentropy = found.high
        said.append(
            f"This model has no HELV: above {entropy:.3g} bits of entropy hardly any varentropy is below three quarters of "
            f"what is high (the lowest is {varentropy:.3g} bits²). A clarification is never inserted."
        )
    for name, part in (("fitting", found.fitting), ("checking", found.checking)):
        if abs(part.temperature.value - 1) > NEUTRAL:
            said.append(
                f"On the {name} half the mean temperature is {part.temperature.value:.3f} of the base temperature "
                f"({part.temperature.low:.3f} to {part.temperature.high:.3f}): give more prompts."
            )
        said += [
            f"{share:.1%} of {regime}'s tokens of the {name} half meet a clamp."
            for regime, share in part.clamped.items()
            if share > CLAMPED
        ]
    for regime, share in found.fitting.shares.items():
        tokens = round(share.value * found.fitting.tokens)
        if regime == "ADAPTIVE" or (regime == "HELV" and not found.has_helv):
            continue
        if share.value < found.targets[regime] / 2:
            said.append(f"{regime} gets {share.value:.2%} and not {found.targets[regime]:.2%}: there are no more such tokens.")
        elif tokens < _FEW:
            said.append(f"{regime} rests on {tokens} tokens of the fitting half: give more prompts.")
    return said


def regimes_of(measured: Measured, config: EntropixConfig) -> np.ndarray:
    """The regime of each token under a configuration, by number."""
    constants = Constants.from_config(config, torch.float32, "cpu")
    entropy = torch.from_numpy(measured.entropy.astype(np.float32))
    return classify(entropy, torch.from_numpy(measured.varentropy.astype(np.float32)), constants).numpy()


def shares_of(prompts: Sequence[Measured], config: EntropixConfig, generator: np.random.Generator) -> dict[str, Share]:
    """Each regime's share of the tokens, with an interval from drawing the prompts again (a cluster bootstrap)."""
    counts = np.zeros((len(prompts), len(REGIMES)), dtype=np.int64)
    np.add.at(counts, (_place_of_tokens(prompts), regimes_of(Measured.joined(prompts), config)), 1)
    shares = _ratios(counts, counts.sum(1, keepdims=True), generator)
    return dict(zip(REGIMES, shares, strict=True))


def _mean_temperature(prompts: Sequence[Measured], config: EntropixConfig, generator: np.random.Generator) -> Share:
    """Mean temperature of the tokens that aren't argmax, relative to the base temperature; 1 if all are argmax."""
    temperature = _parameters(Measured.joined(prompts), dict(config.numbers()))[0] / config.base.temperature
    places = _place_of_tokens(prompts)
    totals = np.bincount(places, weights=temperature, minlength=len(prompts))  # argmax has a temperature of 0
    tokens = np.bincount(places[temperature > 0], minlength=len(prompts))
    return _ratios(totals[:, None], tokens[:, None], generator)[0] if tokens.sum() else Share(1.0, 1.0, 1.0)


def _place_of_tokens(prompts: Sequence[Measured]) -> np.ndarray:
    """The place among the prompts of the one that each token is of, ``[tokens]``."""
    return np.repeat(np.arange(len(prompts)), [len(part) for part in prompts])


def _ratios(parts: np.ndarray, wholes: np.ndarray, generator: np.random.Generator) -> list[Share]:
    """Sum over prompts of each column of ``parts [prompts, n]``, by that of ``wholes [prompts, n or 1]``."""
    drawn = generator.integers(len(parts), size=(RESAMPLES, len(parts)))
    again = parts[drawn].sum(1) / np.maximum(wholes[drawn].sum(1), 1)
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    values = parts.sum(0) / wholes.sum(0)
    return [Share(float(value), float(low[i]), float(high[i])) for i, value in enumerate(values)]


def _clamped(measured: Measured, config: EntropixConfig) -> dict[str, float]:
    """Share of each regime's tokens whose parameters a clamp changes, at whichever base temperature it is largest."""
    regimes = regimes_of(measured, config)
    largest = dict.fromkeys(REGIMES, 0.0)
    for temperature in (config.base.temperature, *BASES):
        numbers = dict(config.numbers()) | {"base.temperature": temperature}
        free = {name: {"max": np.inf, "min": -np.inf}.get(name.rpartition("_")[2], value) for name, value in numbers.items()}
        met = (_parameters(measured, numbers) != _parameters(measured, free)).any(0)
        for regime in Regime:
            if (tokens := regimes == regime).any():
                largest[regime.name] = max(largest[regime.name], float(met[tokens].mean()))
    return largest


def _parameters(measured: Measured, numbers: Mapping[str, float]) -> np.ndarray:
    """Temperature, top_p, top_k and min_p of each token by the sampler's own rule, ``[4, tokens]``."""
    constants = Constants(
        torch.tensor([[*numbers.values()]], dtype=torch.float64), {name: column for column, name in enumerate(numbers)}
    )
    entropy, varentropy = torch.from_numpy(measured.entropy), torch.from_numpy(measured.varentropy)
    regime = classify(entropy.float(), varentropy.float(), constants)
    metrics = LogitsMetrics(entropy, varentropy, torch.zeros_like(entropy))
    chosen = parameters(regime, metrics, None, constants)
    return torch.stack([chosen.temperature, chosen.top_p, chosen.top_k.double(), chosen.min_p]).numpy()


def preset_text(calibration: Calibration, base: EntropixConfig, model: str, notes: Sequence[str] = ()) -> str:
    """What was found as a settings file that ``--sampler-config`` takes.

    Args:
        calibration: what was found.
        base: the preset that it started from.
        model: its name.
        notes: sentences for the file's comment.
    """
    found = calibration
    name = printable(" ".join(model.split()))  # a comment ends with its line
    fitting, checking = found.fitting, found.checking
    lines = [
        f"# Borders and parameters fitted to {name}:",
        *(f"# {printable(' '.join(note.split()))}" for note in notes),
        f"# {fitting.prompts} prompts and {fitting.tokens} tokens fitted, {checking.prompts} and {checking.tokens} checked,",
        f"# drawn {'with these parameters' if found.with_regimes else 'without regimes'}.",
        "# Share of tokens, in %: asked for, on the fitting half, on the checking half (95 % interval), at a clamp there.",
    ]
    for name in REGIMES:
        check = checking.shares[name]
        lines.append(
            f"#   {name:<8} {100 * found.targets[name]:6.2f} {100 * fitting.shares[name].value:6.2f} {100 * check.value:6.2f}"
            f" ({100 * check.low:.2f} to {100 * check.high:.2f}) {100 * checking.clamped[name]:6.2f}"
        )
    mean = checking.temperature
    lines.append("# Mean temperature of the tokens that aren't argmax, relative to the base temperature, on either half:")
    lines.append(f"#   {fitting.temperature.value:.3f} {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})")
    lines += [f"# Doubtful: {sentence}" for sentence in doubts(found)]
    settings: dict[str, Any] = {"preset": base.preset_name}
    if base.fidelity != "corrected":
        settings["fidelity"] = base.fidelity
    # In full, so that they mean the same over any preset.
    settings |= found.config.model_dump(include=set(SECTIONS))
    return "\n".join(lines) + "\n" + tomli_w.dumps(settings)


def _after(values: np.ndarray, count: int) -> float:
    """A border just after the ``count`` smallest values: halfway to the next larger one, in few digits."""
    ordered = np.sort(values)
    last = float(ordered[count - 1]) if count else 0.0
    larger = ordered[ordered > last]
    if not len(larger):
        return float(np.nextafter(np.float32(last), np.float32(np.inf)))
    border = (last + float(larger[0])) / 2
    rounded = (float(f"{border:.{digits}g}") for digits in range(4, 17))
    return next((value for value in rounded if last < value < larger[0]), border)
