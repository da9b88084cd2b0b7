"""top-nσ: keep tokens whose logit is within n standard deviations of the largest (arXiv 2411.07641)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_entropix.samplers.base import KernelRule, Plan, RowView, Sampler
from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class TopNSigmaSettings(Section):
    """Settings of top-nσ."""

    top_n_sigma: float = setting(
        "How far below the largest logit to keep tokens; 0 or less: all.", "standard deviations", default=1.0, ge=-1, le=100
    )


class TopNSigma(Sampler, Stage):
    """The request's own temperature and filters, on the tokens with a logit of at least max - n·σ.

    σ is the population standard deviation of the row's finite logits. In terms of probabilities at temperature T the floor is
    ``exp(-n·σ / T)`` of the largest, which is a min_p: a row needs no more than that number.
    """

    name = "top_n_sigma"
    aliases = ("nsigma",)
    setting_aliases = (("nsigma", "top_n_sigma"),)
    # llama.cpp's: a chain may name it and leave it off.
    chain_defaults = (("top_n_sigma", -1.0),)
    neutral = (("top_n_sigma", -1.0, 0.0),)
    Settings = TopNSigmaSettings

    def plan(self, rows: RowView) -> Plan:
        """The floor as min_p, unless the request's own is higher."""
        n = rows.settings["top_n_sigma"]
        floor = (-n * rows.spread / rows.base.temperature).exp().masked_fill(n <= 0, 0.0)
        return Plan(replace(rows.base, min_p=floor.maximum(rows.base.min_p)))

    def kernel_rule(self, backend: str) -> KernelRule | None:
        """The same in Triton."""
        if backend != "triton":
            return None
        from vllm_entropix.samplers.triton_.around_own import top_n_sigma

        return KernelRule(top_n_sigma, reads_spread=True)

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """As a stage of a chain: keep l ≥ max - n·σ, of what is left."""
        from vllm_entropix.distribution.statistics import spread
        from vllm_entropix.distribution.survivors import keep, slack

        n = rows["top_n_sigma"]
        below = logits - logits.amax(dim=-1, keepdim=True)
        return keep(logits, (below >= -n * spread(below).unsqueeze(-1) * (1 + slack(logits))) | (n <= 0))
