"""Parameters that move the temperature around the base temperature, and not away from it.

Over the tokens that aren't argmax the mean temperature is the base temperature. ``strength`` says how far single tokens go
from it: above 1 it is warmer where the model is unsure, which is entropix's idea, and below 1 it is cooler there, which is
that of arXiv 2510.05987. Everything else that the regimes could change is left alone: top_p, top_k and min_p are the base's,
attention has no say, and one draw is one draw, since the best of several is a cooling of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vllm_entropix.records.regimes import Regime

# Temperature of ADAPTIVE's most unsure token of twenty, relative to the base temperature.
WARM, COOL = 1.25, 0.8
# No token's temperature is beyond these parts of the base temperature, whatever its metrics, before the mean is brought to 1.
_LOWEST, _HIGHEST = 0.2, 4.0
# No vocabulary has a million tokens, so no entropy is above this.
_MOST_BITS = 20.0
_DIGITS = 6

# What takes no part: clamps that nothing meets, and slopes of 0.
UNMOVED: Mapping[str, dict[str, float]] = {
    "helv": {"temperature_attention_entropy": 0.0, "temperature_max": 100.0},
    "lehv": {"temperature_interaction": 0.0, "temperature_max": 100.0, "top_k_disagreement": 0.0, "top_k_min": 1},
    "hehv": {
        "temperature_attention_varentropy": 0.0,
        "temperature_min": 0.001,
        "top_p_attention_entropy": 0.0,
        "top_p_min": 1e-6,
    },
    "adaptive": {
        "samples": 1,
        "temperature_attention": 0.0,
        "temperature_agreement": 0.0,
        "temperature_max": 100.0,
        "top_p_attention_varentropy": 0.0,
        "top_p_min": 1e-6,
        "top_p_max": 1.0,
        "top_k_interaction": 0.0,
        "top_k_agreement": 0.0,
        "top_k_min": 1,
        "top_k_max": 100_000,
        "min_p_logits": 0.0,
        "min_p_min": 0.0,
        "min_p_max": 1.0,
    },
}
# Settings that a temperature is proportional to.
_FACTORS = (
    ("helv", "temperature_offset"),
    ("lehv", "temperature_offset"),
    ("hehv", "temperature_offset"),
    ("adaptive", "temperature_offset"),
    ("adaptive", "temperature_logits"),
)

# No token of this, whatever its metrics.
_NO_REGIME = {
    "thresholds.lelv.entropy_below": 0.0,
    "thresholds.helv.entropy_above": 64.0,
    "thresholds.lehv.entropy_below": 0.0,
    "thresholds.hehv.entropy_above": 64.0,
}


def without_regimes(min_p: float) -> dict[str, float]:
    """Constants of a request under which every token is drawn with the base parameters, whose min_p is this."""
    adaptive = {f"adaptive.{name}": value for name, value in UNMOVED["adaptive"].items()}
    return {
        **_NO_REGIME,
        **adaptive,
        "adaptive.temperature_offset": 1.0,
        "adaptive.temperature_logits": 0.0,
        "adaptive.min_p": min_p,
    }


Sections = dict[str, dict[str, float]]
"""Section of the settings → setting → value."""


def fit(entropy: np.ndarray, varentropy: np.ndarray, regime: np.ndarray, high_varentropy: float, strength: float) -> Sections:
    """Sections of the regimes' parameters under which these tokens' mean temperature is the base temperature.

    ADAPTIVE's temperature is a straight line over entropy + varentropy, with a mean of 1 and ``strength`` at the 95 % quantile,
    as far as no token can get far from it. HELV and HEHV have ``strength``, and LEHV, which has few choices, its root.

    Args:
        entropy: bits, ``[tokens]``.
        varentropy: bits², ``[tokens]``.
        regime: int ``[tokens]``, values of :class:`Regime`.
        high_varentropy: bits², which ADAPTIVE's varentropy doesn't exceed.
        strength: of the move, above 0; 1 doesn't move.
    """
    unsure = (entropy + varentropy)[regime == Regime.ADAPTIVE]
    mean = float(unsure.mean()) if len(unsure) else 0.0
    spread = float(np.quantile(unsure, 0.95)) - mean if len(unsure) else 0.0
    slope = (strength - 1) / spread if spread > 0 else 0.0
    # Within the bounds at either end of what a token's entropy + varentropy can be.
    beyond = _MOST_BITS + high_varentropy - mean
    slope = min(max(slope, (_LOWEST - 1) / beyond), (_HIGHEST - 1) / beyond)
    if mean > 0:
        slope = min(max(slope, (1 - _HIGHEST) / mean), (1 - _LOWEST) / mean)
    moved: Sections = {name: dict(section) for name, section in UNMOVED.items()}
    moved["helv"]["temperature_offset"] = moved["hehv"]["temperature_offset"] = strength
    moved["lehv"]["temperature_offset"] = strength**0.5
    moved["adaptive"] |= {"temperature_offset": 1 - slope * mean, "temperature_logits": slope}
    factors = np.array([np.nan, strength, strength**0.5, strength, 1.0])[regime]
    drawn = factors[~np.isnan(factors)]
    return scaled(moved, 1 / float(drawn.mean()) if len(drawn) else 1.0)


def scaled(sections: Mapping[str, Mapping[str, Any]], factor: float) -> Sections:
    """The same with every temperature times ``factor``, in few digits."""
    result: Sections = {name: dict(section) for name, section in sections.items()}
    for section, name in _FACTORS:
        result[section][name] = float(f"{result[section][name] * factor:.{_DIGITS}g}")
    return result
