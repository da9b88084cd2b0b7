"""What a regime does: from regime and metrics to temperature, top_p, top_k, min_p and number of draws (SEMANTICS 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.distribution.constants import Constants
from vllm_entropix.distribution.plan import Parameters
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.records.regimes import Regime


def parameters(
    regime: Tensor, logits: LogitsMetrics, attention: AttentionStatistics | None, constants: Constants
) -> Parameters:
    """Parameters of each row. ``attention`` None: terms with attention metrics are left out.

    A row whose metrics aren't finite gets the base parameters and a plain draw (D13).
    """
    base_temperature, base_top_p = constants["base.temperature"], constants["base.top_p"]
    base_top_k, base_min_p = constants["base.top_k"], constants["base.min_p"]
    zeros = torch.zeros_like(logits.entropy)
    ones = torch.ones_like(zeros)
    if attention is None:
        entropy = varentropy = agreement = interaction = disagreement = zeros
    else:
        measured = attention.measured
        entropy, varentropy, agreement, interaction = (
            metric.to(zeros.dtype) if measured is None else torch.where(measured, metric.to(zeros.dtype), 0.0)
            for metric in (
                attention.attention_entropy,
                attention.attention_varentropy,
                attention.agreement,
                attention.interaction_strength,
            )
        )
        disagreement = 1 - agreement if measured is None else torch.where(measured, 1 - agreement, 0.0)

    def clip(value: Tensor, name: str) -> Tensor:
        return torch.minimum(torch.maximum(value, constants[f"{name}_min"]), constants[f"{name}_max"])

    logits_sum = logits.entropy + logits.varentropy
    # ADAPTIVE first; the other regimes are laid over it.
    temperature = base_temperature * (
        constants["adaptive.temperature_offset"]
        + constants["adaptive.temperature_logits"] * logits_sum
        + constants["adaptive.temperature_attention"] * (entropy + varentropy)
        - constants["adaptive.temperature_agreement"] * agreement
    )
    temperature = torch.minimum(temperature, constants["adaptive.temperature_max"])
    top_p = clip(base_top_p * (1 + constants["adaptive.top_p_attention_varentropy"] * varentropy), "adaptive.top_p")
    top_k = clip(
        torch.round(  # half to even, as the original
            base_top_k
            * (1 + constants["adaptive.top_k_interaction"] * interaction - constants["adaptive.top_k_agreement"] * agreement)
        ),
        "adaptive.top_k",
    )
    min_p = clip(constants["adaptive.min_p"] * (1 - constants["adaptive.min_p_logits"] * logits_sum), "adaptive.min_p")
    samples = constants["adaptive.samples"] * ones

    helv, lehv, hehv = regime == Regime.HELV, regime == Regime.LEHV, regime == Regime.HEHV
    helv_temperature = torch.minimum(
        constants["helv.temperature_max"],
        base_temperature * (constants["helv.temperature_offset"] + constants["helv.temperature_attention_entropy"] * entropy),
    )
    lehv_temperature = torch.minimum(
        constants["lehv.temperature_max"],
        base_temperature * (constants["lehv.temperature_offset"] + constants["lehv.temperature_interaction"] * interaction),
    )
    lehv_top_k = torch.maximum(
        constants["lehv.top_k_min"],
        torch.trunc(base_top_k * (1 + constants["lehv.top_k_disagreement"] * disagreement)),
    )
    hehv_temperature = torch.maximum(
        constants["hehv.temperature_min"],
        base_temperature
        * (constants["hehv.temperature_offset"] + constants["hehv.temperature_attention_varentropy"] * varentropy),
    )
    hehv_top_p = torch.maximum(constants["hehv.top_p_min"], base_top_p - constants["hehv.top_p_attention_entropy"] * entropy)
    temperature = torch.where(helv, helv_temperature, temperature)
    temperature = torch.where(lehv, lehv_temperature, temperature)
    temperature = torch.where(hehv, hehv_temperature, temperature)
    top_p = torch.where(helv | lehv, base_top_p, torch.where(hehv, hehv_top_p, top_p))
    top_k = torch.where(helv | hehv, base_top_k, torch.where(lehv, lehv_top_k, top_k))
    plain = helv | lehv | hehv
    min_p = torch.where(plain, base_min_p, min_p)
    samples = torch.where(plain, 1.0, samples)

    # The sums are finite exactly when every metric is; LELV reads no attention.
    usable = logits_sum.isfinite() & ((entropy + varentropy + agreement + interaction).isfinite() | (regime == Regime.LELV))
    # A coefficient can drive the temperature to zero or below; that isn't a distribution, so it counts as unusable too.
    usable &= temperature > 0
    chosen = Parameters(
        temperature=torch.where(usable, temperature, base_temperature),
        top_p=torch.where(usable, top_p, base_top_p),
        top_k=torch.where(usable, top_k, base_top_k).to(torch.int64),
        min_p=torch.where(usable, min_p, base_min_p),
        samples=torch.where(usable, samples, 1.0).to(torch.int64),
    )
    return chosen.as_argmax(regime == Regime.LELV)


def base_parameters(rows: Tensor, constants: Constants) -> Parameters:
    """The base parameters for every row (regimes switched off); ``rows [rows]`` gives number, type and device."""
    temperature, top_p, top_k, min_p = (
        constants[f"base.{name}"].expand_as(rows).contiguous() for name in ("temperature", "top_p", "top_k", "min_p")
    )
    return Parameters(temperature, top_p, top_k.to(torch.int64), min_p, torch.ones_like(rows, dtype=torch.int64))


def confidence(logits: LogitsMetrics, attention: AttentionStatistics | None, constants: Constants) -> Tensor:
    """The constant C of the candidates' score, ``[rows]``; attention terms are left out if attention wasn't measured."""

    def weight(name: str) -> Tensor:
        return constants[f"confidence.{name}"]

    score = (1 - logits.entropy) * weight("logits_entropy") + (1 - logits.varentropy) * weight("logits_varentropy")
    if attention is None:
        return score
    attended = (
        (1 - attention.attention_entropy.to(score.dtype)) * weight("attention_entropy")
        + (1 - attention.attention_varentropy.to(score.dtype)) * weight("attention_varentropy")
        + attention.agreement.to(score.dtype) * weight("agreement")
        + attention.interaction_strength.to(score.dtype) * weight("interaction")
    )
    if attention.measured is not None:
        attended = torch.where(attention.measured, attended, 0.0)
    return score + attended
