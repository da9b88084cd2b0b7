"""min_p: keep tokens at least so probable, relative to the most probable one (arXiv 2407.01082)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_entropix.samplers.base import KernelRule, Plan, RowView, Sampler
from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class MinPSettings(Section):
    """Settings of min_p."""

    min_p: float = setting(
        "Smallest probability relative to the largest, of requests that give none.", "ratio", default=0.05, ge=0, le=1
    )


class MinP(Sampler, Stage):
    """The request's own temperature, top_p and top_k, and a min_p whether it asks for one or not."""

    name = "min_p"
    Settings = MinPSettings

    def plan(self, rows: RowView) -> Plan:
        """min_p of the request, or else of the settings."""
        own = rows.base.min_p
        return Plan(replace(rows.base, min_p=own.where(own > 0, rows.settings["min_p"])))

    def kernel_rule(self, backend: str) -> KernelRule | None:
        """The same in Triton."""
        if backend != "triton":
            return None
        from vllm_entropix.samplers.triton_.around_own import min_p

        return KernelRule(min_p)

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """As a stage of a chain: keep p ≥ min_p · max p, of what is left."""
        from vllm_entropix.distribution.survivors import keep, slack

        relative = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        return keep(logits, relative >= rows["min_p"] * (1 - slack(logits)))
