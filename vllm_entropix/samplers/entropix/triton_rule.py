"""Regime, parameters and confidence of rows on a GPU: ``regimes.classify``, ``parameters.parameters`` and ``confidence``.

The step's decision kernel calls these functions for the rows of a block; each number is a vector, an element a row.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from vllm_entropix.samplers.entropix.settings import EntropixConfig

_COLUMN = {name: tl.constexpr(column) for column, (name, _) in enumerate(EntropixConfig.preset().numbers())}

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
C_ENTROPY, C_VARENTROPY = _COLUMN["confidence.logits_entropy"], _COLUMN["confidence.logits_varentropy"]
C_ATTENTION_ENTROPY = _COLUMN["confidence.attention_entropy"]
C_ATTENTION_VARENTROPY = _COLUMN["confidence.attention_varentropy"]
C_AGREEMENT, C_INTERACTION = _COLUMN["confidence.agreement"], _COLUMN["confidence.interaction"]

_WHOLE = tl.constexpr(2.0**23)  # float32 from here on are whole numbers
_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _is_finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def _clip(value, smallest, largest):
    return tl.minimum(tl.maximum(value, smallest, _NAN), largest, _NAN)


@triton.jit
def _truncated(value):
    return tl.where(value < 0, tl.ceil(value), tl.floor(value))


@triton.jit
def _rounded(value):
    """To the nearest whole number, half to even."""
    size = tl.abs(value)
    rounded = tl.where(size < _WHOLE, (size + _WHOLE) - _WHOLE, size)
    return tl.where(value < 0, -rounded, rounded)


@triton.jit
def classify(numbers, entropy, varentropy):
    """The regime of each row, int32, as ``regimes.classify`` gives it."""
    regime = tl.full(entropy.shape, 4, tl.int32)
    regime = tl.where(
        (entropy > tl.load(numbers + HEHV_ENTROPY)) & (varentropy > tl.load(numbers + HEHV_VARENTROPY)), 3, regime
    )
    regime = tl.where(
        (entropy < tl.load(numbers + LEHV_ENTROPY)) & (varentropy > tl.load(numbers + LEHV_VARENTROPY)), 2, regime
    )
    regime = tl.where(
        (entropy > tl.load(numbers + HELV_ENTROPY)) & (varentropy < tl.load(numbers + HELV_VARENTROPY)), 1, regime
    )
    regime = tl.where(
        (entropy < tl.load(numbers + LELV_ENTROPY)) & (varentropy < tl.load(numbers + LELV_VARENTROPY)), 0, regime
    )
    return tl.where(_is_finite(entropy) & _is_finite(varentropy), regime, 4)


@triton.jit
def reads_attention(numbers, entropy, varentropy):
    """Which rows' plans read attention."""
    return classify(numbers, entropy, varentropy) != 0


@triton.jit
def plan(numbers, entropy, varentropy, attended, ae, av, agreement, interaction, own, told):
    """Parameters of each row, and whether it asks for the clarification, as ``parameters.parameters`` computes them.

    Args:
        numbers: pointers to the rows' settings.
        entropy: of the logits.
        varentropy: of the logits.
        attended: was the row's attention measured? If not, its four numbers are 0.
        ae: attention entropy.
        av: attention varentropy.
        agreement: of the heads.
        interaction: its strength.
        own: pointers to the entropix fields of the rows' records: regime and confidence.
        told: the rows that have a record.
    """
    regime = classify(numbers, entropy, varentropy)
    score = (1 - entropy) * tl.load(numbers + C_ENTROPY) + (1 - varentropy) * tl.load(numbers + C_VARENTROPY)
    of_attention = (
        (1 - ae) * tl.load(numbers + C_ATTENTION_ENTROPY)
        + (1 - av) * tl.load(numbers + C_ATTENTION_VARENTROPY)
        + agreement * tl.load(numbers + C_AGREEMENT)
        + interaction * tl.load(numbers + C_INTERACTION)
    )
    score = tl.where(attended, score + of_attention, score)
    tl.store(own, regime.to(tl.float32), mask=told)
    tl.store(own + 1, score, mask=told)

    total = entropy + varentropy
    disagreement = tl.where(attended, 1 - agreement, 0.0)
    base, base_p = tl.load(numbers + TEMPERATURE), tl.load(numbers + TOP_P)
    base_k, base_m = tl.load(numbers + TOP_K), tl.load(numbers + MIN_P)
    # ADAPTIVE first; the other regimes are laid over it.
    t = base * (
        1
        + tl.load(numbers + ADA_LOGITS) * total
        + tl.load(numbers + ADA_ATTENTION) * (ae + av)
        - tl.load(numbers + ADA_AGREEMENT) * agreement
    )
    t = tl.minimum(t, tl.load(numbers + ADA_MAX), _NAN)
    p = base_p * (1 + tl.load(numbers + ADA_TOP_P) * av)
    p = _clip(p, tl.load(numbers + ADA_TOP_P_MIN), tl.load(numbers + ADA_TOP_P_MAX))
    k = base_k * (1 + tl.load(numbers + ADA_TOP_K) * interaction - tl.load(numbers + ADA_TOP_K_AGREEMENT) * agreement)
    k = _clip(_rounded(k), tl.load(numbers + ADA_TOP_K_MIN), tl.load(numbers + ADA_TOP_K_MAX))
    m = tl.load(numbers + ADA_MIN_P) * (1 - tl.load(numbers + ADA_MIN_P_LOGITS) * total)
    m = _clip(m, tl.load(numbers + ADA_MIN_P_MIN), tl.load(numbers + ADA_MIN_P_MAX))

    helv = base * (tl.load(numbers + HELV_OFFSET) + tl.load(numbers + HELV_SLOPE) * ae)
    lehv = base * (tl.load(numbers + LEHV_OFFSET) + tl.load(numbers + LEHV_SLOPE) * interaction)
    hehv = base * (tl.load(numbers + HEHV_OFFSET) + tl.load(numbers + HEHV_SLOPE) * av)
    t = tl.where(regime == 1, tl.minimum(helv, tl.load(numbers + HELV_MAX), _NAN), t)
    t = tl.where(regime == 2, tl.minimum(lehv, tl.load(numbers + LEHV_MAX), _NAN), t)
    t = tl.where(regime == 3, tl.maximum(hehv, tl.load(numbers + HEHV_MIN), _NAN), t)
    wider = _truncated(base_k * (1 + tl.load(numbers + LEHV_WIDEN) * disagreement))
    narrower = tl.maximum(base_p - tl.load(numbers + HEHV_DROP) * ae, tl.load(numbers + HEHV_TOP_P_MIN), _NAN)
    adaptive = regime == 4
    p = tl.where(adaptive, p, tl.where(regime == 3, narrower, base_p))
    k = tl.where(adaptive, k, tl.where(regime == 2, tl.maximum(wider, tl.load(numbers + LEHV_TOP_K_MIN), _NAN), base_k))
    m = tl.where(adaptive, m, base_m)
    n = tl.where(adaptive, tl.load(numbers + ADA_SAMPLES), 1.0)

    usable = _is_finite(total) & (_is_finite(ae + av + agreement + interaction) | (regime == 0)) & (t > 0)
    argmax = regime == 0
    t = tl.where(argmax, 0.0, tl.where(usable, t, base))
    p = tl.where(argmax, 1.0, tl.where(usable, p, base_p))
    k = tl.where(argmax, 1.0, tl.where(usable, k, base_k))
    m = tl.where(argmax, 0.0, tl.where(usable, m, base_m))
    n = tl.where(argmax | (usable == 0), 1.0, n)
    return t, p, k, m, n, regime == 1


@triton.jit
def plan_without_regimes(numbers, entropy, varentropy, attended, ae, av, agreement, interaction, own, told):
    """The base parameters for every row; regimes are recorded, and HELV asks, all the same."""
    _t, _p, _k, _m, n, asks = plan(numbers, entropy, varentropy, attended, ae, av, agreement, interaction, own, told)
    t, p = tl.load(numbers + TEMPERATURE), tl.load(numbers + TOP_P)
    return t, p, tl.load(numbers + TOP_K), tl.load(numbers + MIN_P), tl.full(n.shape, 1.0, tl.float32), asks
