"""Thresholds for a model from its own entropies: proposed so that each regime gets a share of the tokens that one asks for.

Regimes are rectangles in the entropy × varentropy plane, and the two metrics go together: both are near 0 where the model is
sure, and varentropy is large only at a middling entropy or above. So the borders can't be quantiles of one metric at a time.
They are found one after the other:

1. LEHV and HEHV: the varentropy above which their two shares lie together, and the entropy that parts them there. These two
   borders are what "high" means; no other regime reaches beyond them.
2. LELV: the entropy below which a little more than its share lies, and the varentropy that leaves out the most varied of those.
3. HELV: above the high entropy, the varentropy below which its share lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tomli_w
import torch

from vllm_entropix.distribution.constants import Constants
from vllm_entropix.observability.terminal import printable
from vllm_entropix.records.regimes import REGIMES
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
class Calibration:
    """What a calibration found.

    Attributes:
        thresholds: the proposal.
        targets: shares that were asked for, ADAPTIVE's included.
        fitting: shares on the prompts that the thresholds were fitted to, by regime.
        checking: shares on the other prompts.
        prompts: number of prompts in either half.
        tokens: number of tokens in either half.
    """

    thresholds: Thresholds
    targets: Mapping[str, float]
    fitting: Mapping[str, Share]
    checking: Mapping[str, Share]
    prompts: tuple[int, int]
    tokens: tuple[int, int]


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


def calibrate(prompts: Sequence[Measured], shares: Mapping[str, float], base: EntropixConfig, seed: int = 0) -> Calibration:
    """Fit thresholds to half of the prompts and check them on the other half.

    Halves are of prompts and not of tokens: tokens of one text are alike.

    Args:
        prompts: what was measured, by prompt.
        shares: target share of each regime but ADAPTIVE.
        base: the configuration whose thresholds are replaced.
        seed: of the split and of the intervals.

    Raises:
        ConfigError: there is too little to fit to.
    """
    usable = [part for part in prompts if len(part)]
    if len(usable) < 2:
        raise ConfigError("calibration needs two prompts with an answer or more: half of them fit, half of them check")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(usable))
    fitting = [usable[index] for index in order[::2]]
    checking = [usable[index] for index in order[1::2]]
    tokens = sum(map(len, fitting)), sum(map(len, checking))
    if min(tokens) < MIN_TOKENS:
        raise ConfigError(
            f"calibration needs {MIN_TOKENS} tokens or more in either half, but has {tokens[0]} and {tokens[1]}; "
            "give more prompts, or let the answers be longer"
        )
    thresholds = propose(Measured.joined(fitting), shares)
    changed = base.model_copy(update={"thresholds": thresholds})
    return Calibration(
        thresholds=thresholds,
        targets={**shares, "ADAPTIVE": 1 - sum(shares.values())},
        fitting=shares_of(fitting, changed, generator),
        checking=shares_of(checking, changed, generator),
        prompts=(len(fitting), len(checking)),
        tokens=tokens,
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

    lost = varentropy[even & (entropy > high_entropy)]
    wanted = number(shares["HELV"])
    helv_varentropy = min(_after(lost, wanted), high_varentropy) if wanted < len(lost) else high_varentropy
    return Thresholds.model_validate(
        {
            "lelv": {"entropy_below": lelv_entropy, "varentropy_below": lelv_varentropy},
            "helv": {"entropy_above": high_entropy, "varentropy_below": helv_varentropy},
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
    for regime, share in found.fitting.items():
        tokens = round(share.value * found.tokens[0])
        if regime == "ADAPTIVE":
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
    counts = np.stack([np.bincount(regimes_of(part, config), minlength=len(REGIMES)) for part in prompts])
    drawn = generator.integers(len(prompts), size=(RESAMPLES, len(prompts)))
    again = counts[drawn].sum(1)
    again = again / again.sum(1, keepdims=True)
    low, high = np.quantile(again, [0.025, 0.975], axis=0)
    values = counts.sum(0) / counts.sum()
    return {name: Share(float(values[i]), float(low[i]), float(high[i])) for i, name in enumerate(REGIMES)}


def preset_text(calibration: Calibration, base: EntropixConfig, model: str) -> str:
    """The proposal as a settings file that ``--sampler-config`` takes."""
    found = calibration
    name = printable(" ".join(model.split()))  # a comment ends with its line
    lines = [
        f"# Thresholds fitted to {name} by `vllm-entropix calibrate`:",
        f"# {found.prompts[0]} prompts and {found.tokens[0]} tokens fitted, {found.prompts[1]} and {found.tokens[1]} checked.",
        "# Share of tokens, in %: asked for, on the fitting half, on the checking half (95 % interval).",
    ]
    for name in REGIMES:
        check = found.checking[name]
        lines.append(
            f"#   {name:<8} {100 * found.targets[name]:6.2f} {100 * found.fitting[name].value:6.2f} {100 * check.value:6.2f}"
            f" ({100 * check.low:.2f} to {100 * check.high:.2f})"
        )
    lines += [f"# Doubtful: {sentence}" for sentence in doubts(found)]
    settings: dict[str, Any] = {"preset": base.preset_name}
    if base.fidelity != "corrected":
        settings["fidelity"] = base.fidelity
    settings["thresholds"] = found.thresholds.model_dump()
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
