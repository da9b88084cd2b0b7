"""Regime, parameters and confidence of rows on a GPU: ``regimes.classify``, ``parameters.parameters`` and ``confidence``.

The step's decision kernel calls these functions for the rows of a block; each number is a vector, an element a row.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from vllm_entropix.samplers.entropix import columns

COLUMN = tl.constexpr(columns.COLUMN)
vars(COLUMN).update(columns.COLUMN._asdict())  # the compiler asks what is in a constant, the interpreter the constant itself
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
        (entropy > tl.load(numbers + COLUMN.thresholds_hehv_entropy_above))
        & (varentropy > tl.load(numbers + COLUMN.thresholds_hehv_varentropy_above)),
        3,
        regime,
    )
    regime = tl.where(
        (entropy < tl.load(numbers + COLUMN.thresholds_lehv_entropy_below))
        & (varentropy > tl.load(numbers + COLUMN.thresholds_lehv_varentropy_above)),
        2,
        regime,
    )
    regime = tl.where(
        (entropy > tl.load(numbers + COLUMN.thresholds_helv_entropy_above))
        & (varentropy < tl.load(numbers + COLUMN.thresholds_helv_varentropy_below)),
        1,
        regime,
    )
    regime = tl.where(
        (entropy < tl.load(numbers + COLUMN.thresholds_lelv_entropy_below))
        & (varentropy < tl.load(numbers + COLUMN.thresholds_lelv_varentropy_below)),
        0,
        regime,
    )
    return tl.where(_is_finite(entropy) & _is_finite(varentropy), regime, 4)


@triton.jit
def reads_attention(numbers, entropy, varentropy):
    """Which rows' plans read attention."""
    return classify(numbers, entropy, varentropy) != 0


@triton.jit
def plan(numbers, base, entropy, varentropy, spread, attended, ae, av, agreement, interaction, fields, told):
    """Parameters of each row, and whether it asks for the clarification, as ``parameters.parameters`` computes them.

    Args:
        numbers: pointers to the rows' settings.
        base: pointers to the requests' own parameters, which the settings hold.
        entropy: of the logits.
        varentropy: of the logits.
        spread: of the logits.
        attended: was the row's attention measured? If not, its four numbers are 0.
        ae: attention entropy.
        av: attention varentropy.
        agreement: of the heads.
        interaction: its strength.
        fields: pointers to the entropix fields of the rows' records: regime and confidence.
        told: the rows that have a record.
    """
    regime = classify(numbers, entropy, varentropy)
    score = (1 - entropy) * tl.load(numbers + COLUMN.confidence_logits_entropy)
    score += (1 - varentropy) * tl.load(numbers + COLUMN.confidence_logits_varentropy)
    of_attention = (
        (1 - ae) * tl.load(numbers + COLUMN.confidence_attention_entropy)
        + (1 - av) * tl.load(numbers + COLUMN.confidence_attention_varentropy)
        + agreement * tl.load(numbers + COLUMN.confidence_agreement)
        + interaction * tl.load(numbers + COLUMN.confidence_interaction)
    )
    score = tl.where(attended, score + of_attention, score)
    tl.store(fields, regime.to(tl.float32), mask=told)
    tl.store(fields + 1, score, mask=told)

    total = entropy + varentropy
    disagreement = tl.where(attended, 1 - agreement, 0.0)
    base_t, base_p = tl.load(numbers + COLUMN.base_temperature), tl.load(numbers + COLUMN.base_top_p)
    base_k, base_m = tl.load(numbers + COLUMN.base_top_k), tl.load(numbers + COLUMN.base_min_p)
    # ADAPTIVE first; the other regimes are laid over it.
    t = base_t * (
        tl.load(numbers + COLUMN.adaptive_temperature_offset)
        + tl.load(numbers + COLUMN.adaptive_temperature_logits) * total
        + tl.load(numbers + COLUMN.adaptive_temperature_attention) * (ae + av)
        - tl.load(numbers + COLUMN.adaptive_temperature_agreement) * agreement
    )
    t = tl.minimum(t, tl.load(numbers + COLUMN.adaptive_temperature_max), _NAN)
    p = base_p * (1 + tl.load(numbers + COLUMN.adaptive_top_p_attention_varentropy) * av)
    p = _clip(p, tl.load(numbers + COLUMN.adaptive_top_p_min), tl.load(numbers + COLUMN.adaptive_top_p_max))
    k = base_k * (
        1
        + tl.load(numbers + COLUMN.adaptive_top_k_interaction) * interaction
        - tl.load(numbers + COLUMN.adaptive_top_k_agreement) * agreement
    )
    k = _clip(_rounded(k), tl.load(numbers + COLUMN.adaptive_top_k_min), tl.load(numbers + COLUMN.adaptive_top_k_max))
    m = tl.load(numbers + COLUMN.adaptive_min_p) * (1 - tl.load(numbers + COLUMN.adaptive_min_p_logits) * total)
    m = _clip(m, tl.load(numbers + COLUMN.adaptive_min_p_min), tl.load(numbers + COLUMN.adaptive_min_p_max))

    helv = base_t * (
        tl.load(numbers + COLUMN.helv_temperature_offset) + tl.load(numbers + COLUMN.helv_temperature_attention_entropy) * ae
    )
    lehv = base_t * (
        tl.load(numbers + COLUMN.lehv_temperature_offset) + tl.load(numbers + COLUMN.lehv_temperature_interaction) * interaction
    )
    hehv = base_t * (
        tl.load(numbers + COLUMN.hehv_temperature_offset) + tl.load(numbers + COLUMN.hehv_temperature_attention_varentropy) * av
    )
    t = tl.where(regime == 1, tl.minimum(helv, tl.load(numbers + COLUMN.helv_temperature_max), _NAN), t)
    t = tl.where(regime == 2, tl.minimum(lehv, tl.load(numbers + COLUMN.lehv_temperature_max), _NAN), t)
    t = tl.where(regime == 3, tl.maximum(hehv, tl.load(numbers + COLUMN.hehv_temperature_min), _NAN), t)
    wider = _truncated(base_k * (1 + tl.load(numbers + COLUMN.lehv_top_k_disagreement) * disagreement))
    narrower = tl.maximum(
        base_p - tl.load(numbers + COLUMN.hehv_top_p_attention_entropy) * ae,
        tl.load(numbers + COLUMN.hehv_top_p_min),
        _NAN,
    )
    adaptive = regime == 4
    p = tl.where(adaptive, p, tl.where(regime == 3, narrower, base_p))
    k = tl.where(adaptive, k, tl.where(regime == 2, tl.maximum(wider, tl.load(numbers + COLUMN.lehv_top_k_min), _NAN), base_k))
    m = tl.where(adaptive, m, base_m)
    n = tl.where(adaptive, tl.load(numbers + COLUMN.adaptive_samples), 1.0)

    usable = _is_finite(total) & (_is_finite(ae + av + agreement + interaction) | (regime == 0)) & (t > 0)
    argmax = regime == 0
    t = tl.where(argmax, 0.0, tl.where(usable, t, base_t))
    p = tl.where(argmax, 1.0, tl.where(usable, p, base_p))
    k = tl.where(argmax, 1.0, tl.where(usable, k, base_k))
    m = tl.where(argmax, 0.0, tl.where(usable, m, base_m))
    n = tl.where(argmax | (usable == 0), 1.0, n)
    return t, p, k, m, n, regime == 1


@triton.jit
def plan_without_regimes(numbers, base, entropy, varentropy, spread, attended, ae, av, agreement, interaction, fields, told):
    """The base parameters for every row; regimes are recorded, and HELV asks, all the same."""
    _t, _p, _k, _m, n, asks = plan(
        numbers, base, entropy, varentropy, spread, attended, ae, av, agreement, interaction, fields, told
    )
    t, p = tl.load(numbers + COLUMN.base_temperature), tl.load(numbers + COLUMN.base_top_p)
    k, m = tl.load(numbers + COLUMN.base_top_k), tl.load(numbers + COLUMN.base_min_p)
    return t, p, k, m, tl.full(n.shape, 1.0, tl.float32), asks
