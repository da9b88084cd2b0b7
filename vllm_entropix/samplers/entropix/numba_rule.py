"""Regimes, parameters and confidence of all rows: ``regimes.classify``, ``parameters.parameters`` and ``confidence``."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.samplers.entropix.columns import COLUMN

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
        if e < c[COLUMN.thresholds_lelv_entropy_below] and v < c[COLUMN.thresholds_lelv_varentropy_below]:
            regime[row] = 0
        elif e > c[COLUMN.thresholds_helv_entropy_above] and v < c[COLUMN.thresholds_helv_varentropy_below]:
            regime[row] = 1
        elif e < c[COLUMN.thresholds_lehv_entropy_below] and v > c[COLUMN.thresholds_lehv_varentropy_above]:
            regime[row] = 2
        elif e > c[COLUMN.thresholds_hehv_entropy_above] and v > c[COLUMN.thresholds_hehv_varentropy_above]:
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
        score = (ONE - e) * c[COLUMN.confidence_logits_entropy] + (ONE - v) * c[COLUMN.confidence_logits_varentropy]
        ae = av = agreement = interaction = np.float32(0.0)
        disagreement = np.float32(0.0)
        if measured[row]:
            ae, av, agreement, interaction = attention[0, row], attention[1, row], attention[2, row], attention[3, row]
            disagreement = ONE - agreement
            score += (
                (ONE - ae) * c[COLUMN.confidence_attention_entropy]
                + (ONE - av) * c[COLUMN.confidence_attention_varentropy]
                + agreement * c[COLUMN.confidence_agreement]
                + interaction * c[COLUMN.confidence_interaction]
            )
        confidence[row] = score
        kind = regime[row]
        base = c[COLUMN.base_temperature]
        t, p, k, m, n = base, c[COLUMN.base_top_p], c[COLUMN.base_top_k], c[COLUMN.base_min_p], ONE
        if kind == 0:
            temperature[row], top_p[row], top_k[row], min_p[row], samples[row] = 0.0, 1.0, 1, 0.0, 1
            continue
        if kind == 1:
            t = np.minimum(
                c[COLUMN.helv_temperature_max],
                base * (c[COLUMN.helv_temperature_offset] + c[COLUMN.helv_temperature_attention_entropy] * ae),
            )
        elif kind == 2:
            t = np.minimum(
                c[COLUMN.lehv_temperature_max],
                base * (c[COLUMN.lehv_temperature_offset] + c[COLUMN.lehv_temperature_interaction] * interaction),
            )
            k = np.maximum(c[COLUMN.lehv_top_k_min], np.trunc(k * (ONE + c[COLUMN.lehv_top_k_disagreement] * disagreement)))
        elif kind == 3:
            t = np.maximum(
                c[COLUMN.hehv_temperature_min],
                base * (c[COLUMN.hehv_temperature_offset] + c[COLUMN.hehv_temperature_attention_varentropy] * av),
            )
            p = np.maximum(c[COLUMN.hehv_top_p_min], p - c[COLUMN.hehv_top_p_attention_entropy] * ae)
        else:
            t = base * (
                c[COLUMN.adaptive_temperature_offset]
                + c[COLUMN.adaptive_temperature_logits] * logits_sum
                + c[COLUMN.adaptive_temperature_attention] * (ae + av)
                - c[COLUMN.adaptive_temperature_agreement] * agreement
            )
            t = np.minimum(t, c[COLUMN.adaptive_temperature_max])
            p = _clip(
                p * (ONE + c[COLUMN.adaptive_top_p_attention_varentropy] * av),
                c[COLUMN.adaptive_top_p_min],
                c[COLUMN.adaptive_top_p_max],
            )
            k = np.rint(
                k * (ONE + c[COLUMN.adaptive_top_k_interaction] * interaction - c[COLUMN.adaptive_top_k_agreement] * agreement)
            )
            k = _clip(k, c[COLUMN.adaptive_top_k_min], c[COLUMN.adaptive_top_k_max])
            m = _clip(
                c[COLUMN.adaptive_min_p] * (ONE - c[COLUMN.adaptive_min_p_logits] * logits_sum),
                c[COLUMN.adaptive_min_p_min],
                c[COLUMN.adaptive_min_p_max],
            )
            n = c[COLUMN.adaptive_samples]
        if not (np.isfinite(logits_sum) and np.isfinite(ae + av + agreement + interaction) and t > 0):
            t, p, k, m, n = base, c[COLUMN.base_top_p], c[COLUMN.base_top_k], c[COLUMN.base_min_p], ONE
        temperature[row], top_p[row], top_k[row], min_p[row], samples[row] = t, p, np.int64(k), m, np.int64(n)
