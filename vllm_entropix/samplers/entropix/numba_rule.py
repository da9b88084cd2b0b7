"""Regimes, parameters and confidence of all rows: ``regimes.classify``, ``parameters.parameters`` and ``confidence``."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.samplers.entropix.settings import EntropixConfig

_COLUMN = {name: column for column, (name, _) in enumerate(EntropixConfig.preset().numbers())}

# numba takes module-level integers for constants.
LELV_ENTROPY = _COLUMN["thresholds.lelv.entropy_below"]
LELV_VARENTROPY = _COLUMN["thresholds.lelv.varentropy_below"]
HELV_ENTROPY = _COLUMN["thresholds.helv.entropy_above"]
HELV_VARENTROPY = _COLUMN["thresholds.helv.varentropy_below"]
LEHV_ENTROPY = _COLUMN["thresholds.lehv.entropy_below"]
LEHV_VARENTROPY = _COLUMN["thresholds.lehv.varentropy_above"]
HEHV_ENTROPY = _COLUMN["thresholds.hehv.entropy_above"]
HEHV_VARENTROPY = _COLUMN["thresholds.hehv.varentropy_above"]
TEMPERATURE, TOP_P = _COLUMN["base.temperature"], _COLUMN["base.top_p"]
TOP_K, MIN_P = _COLUMN["base.top_k"], _COLUMN["base.min_p"]
HELV_OFFSET, HELV_SLOPE = _COLUMN["helv.temperature_offset"], _COLUMN["helv.temperature_attention_entropy"]
HELV_MAX = _COLUMN["helv.temperature_max"]
LEHV_OFFSET, LEHV_SLOPE = _COLUMN["lehv.temperature_offset"], _COLUMN["lehv.temperature_interaction"]
LEHV_MAX = _COLUMN["lehv.temperature_max"]
LEHV_WIDEN, LEHV_TOP_K_MIN = _COLUMN["lehv.top_k_disagreement"], _COLUMN["lehv.top_k_min"]
HEHV_OFFSET, HEHV_SLOPE = _COLUMN["hehv.temperature_offset"], _COLUMN["hehv.temperature_attention_varentropy"]
HEHV_MIN = _COLUMN["hehv.temperature_min"]
HEHV_DROP, HEHV_TOP_P_MIN = _COLUMN["hehv.top_p_attention_entropy"], _COLUMN["hehv.top_p_min"]
ADA_SAMPLES = _COLUMN["adaptive.samples"]
ADA_LOGITS, ADA_ATTENTION = _COLUMN["adaptive.temperature_logits"], _COLUMN["adaptive.temperature_attention"]
ADA_AGREEMENT, ADA_MAX = _COLUMN["adaptive.temperature_agreement"], _COLUMN["adaptive.temperature_max"]
ADA_TOP_P, ADA_TOP_P_MIN = _COLUMN["adaptive.top_p_attention_varentropy"], _COLUMN["adaptive.top_p_min"]
ADA_TOP_P_MAX = _COLUMN["adaptive.top_p_max"]
ADA_TOP_K, ADA_TOP_K_AGREEMENT = _COLUMN["adaptive.top_k_interaction"], _COLUMN["adaptive.top_k_agreement"]
ADA_TOP_K_MIN, ADA_TOP_K_MAX = _COLUMN["adaptive.top_k_min"], _COLUMN["adaptive.top_k_max"]
ADA_MIN_P, ADA_MIN_P_LOGITS = _COLUMN["adaptive.min_p"], _COLUMN["adaptive.min_p_logits"]
ADA_MIN_P_MIN, ADA_MIN_P_MAX = _COLUMN["adaptive.min_p_min"], _COLUMN["adaptive.min_p_max"]
CONFIDENCE = np.array(
    [
        _COLUMN[f"confidence.{name}"]
        for name in (
            "logits_entropy",
            "logits_varentropy",
            "attention_entropy",
            "attention_varentropy",
            "agreement",
            "interaction",
        )
    ]
)
# With a Python integer numba would go on in float64: what is decided here is what PyTorch decides, to the bit.
ONE = np.float32(1.0)


@compiled()
def classify(entropy: Any, varentropy: Any, constants: Any, regime: Any) -> None:
    """Write each row's regime (int64 ``[rows]``) as ``regimes.classify`` gives it; ``constants [rows or 1, n]``."""
    for row in range(entropy.shape[0]):
        c = constants[row if constants.shape[0] > 1 else 0]
        e, v = entropy[row], varentropy[row]
        regime[row] = 4
        if not (np.isfinite(e) and np.isfinite(v)):
            continue
        if e < c[LELV_ENTROPY] and v < c[LELV_VARENTROPY]:
            regime[row] = 0
        elif e > c[HELV_ENTROPY] and v < c[HELV_VARENTROPY]:
            regime[row] = 1
        elif e < c[LEHV_ENTROPY] and v > c[LEHV_VARENTROPY]:
            regime[row] = 2
        elif e > c[HEHV_ENTROPY] and v > c[HEHV_VARENTROPY]:
            regime[row] = 3


@compiled()
def _clip(value: Any, smallest: Any, largest: Any) -> Any:
    return np.minimum(np.maximum(value, smallest), largest)


@compiled()
def decide(
    regime: Any,
    entropy: Any,
    varentropy: Any,
    attention: Any,
    measured: Any,
    constants: Any,
    temperature: Any,
    top_p: Any,
    top_k: Any,
    min_p: Any,
    samples: Any,
    confidence: Any,
) -> None:
    """Write each row's parameters and confidence, as ``parameters.parameters`` and ``parameters.confidence`` compute them.

    Args:
        regime: int64 ``[rows]``.
        entropy: float32 ``[rows]``.
        varentropy: float32 ``[rows]``.
        attention: float32 ``[4, rows]``: entropy, varentropy, agreement, interaction.
        measured: bool ``[rows]``; the attention of other rows isn't looked at.
        constants: float32 ``[rows or 1, n]``.
        temperature: float32 ``[rows]``, written, like all that follow (``top_k`` and ``samples`` int64).
        top_p: written.
        top_k: written.
        min_p: written.
        samples: written.
        confidence: written.
    """
    for row in range(regime.shape[0]):
        c = constants[row if constants.shape[0] > 1 else 0]
        e, v = entropy[row], varentropy[row]
        logits_sum = e + v
        score = (ONE - e) * c[CONFIDENCE[0]] + (ONE - v) * c[CONFIDENCE[1]]
        ae = av = agreement = interaction = np.float32(0.0)
        disagreement = np.float32(0.0)
        if measured[row]:
            ae, av, agreement, interaction = attention[0, row], attention[1, row], attention[2, row], attention[3, row]
            disagreement = ONE - agreement
            score += (
                (ONE - ae) * c[CONFIDENCE[2]]
                + (ONE - av) * c[CONFIDENCE[3]]
                + agreement * c[CONFIDENCE[4]]
                + interaction * c[CONFIDENCE[5]]
            )
        confidence[row] = score
        kind = regime[row]
        base = c[TEMPERATURE]
        t, p, k, m, n = base, c[TOP_P], c[TOP_K], c[MIN_P], ONE
        if kind == 0:
            temperature[row], top_p[row], top_k[row], min_p[row], samples[row] = 0.0, 1.0, 1, 0.0, 1
            continue
        if kind == 1:
            t = np.minimum(c[HELV_MAX], base * (c[HELV_OFFSET] + c[HELV_SLOPE] * ae))
        elif kind == 2:
            t = np.minimum(c[LEHV_MAX], base * (c[LEHV_OFFSET] + c[LEHV_SLOPE] * interaction))
            k = np.maximum(c[LEHV_TOP_K_MIN], np.trunc(k * (ONE + c[LEHV_WIDEN] * disagreement)))
        elif kind == 3:
            t = np.maximum(c[HEHV_MIN], base * (c[HEHV_OFFSET] + c[HEHV_SLOPE] * av))
            p = np.maximum(c[HEHV_TOP_P_MIN], p - c[HEHV_DROP] * ae)
        else:
            t = base * (ONE + c[ADA_LOGITS] * logits_sum + c[ADA_ATTENTION] * (ae + av) - c[ADA_AGREEMENT] * agreement)
            t = np.minimum(t, c[ADA_MAX])
            p = _clip(p * (ONE + c[ADA_TOP_P] * av), c[ADA_TOP_P_MIN], c[ADA_TOP_P_MAX])
            k = np.rint(k * (ONE + c[ADA_TOP_K] * interaction - c[ADA_TOP_K_AGREEMENT] * agreement))
            k = _clip(k, c[ADA_TOP_K_MIN], c[ADA_TOP_K_MAX])
            m = _clip(c[ADA_MIN_P] * (ONE - c[ADA_MIN_P_LOGITS] * logits_sum), c[ADA_MIN_P_MIN], c[ADA_MIN_P_MAX])
            n = c[ADA_SAMPLES]
        if not (np.isfinite(logits_sum) and np.isfinite(ae + av + agreement + interaction) and t > 0):
            t, p, k, m, n = base, c[TOP_P], c[TOP_K], c[MIN_P], ONE
        temperature[row], top_p[row], top_k[row], min_p[row], samples[row] = t, p, np.int64(k), m, np.int64(n)
