"""vLLM's own draw as a sampler that plans nothing: its rows are measured, and drawn as without the plugin."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_entropix.samplers.base import Bounds, KernelRule, Plan, RowView, Sampler
from vllm_entropix.settings.section import Section

VLLM = "vllm"


class NoSettings(Section):
    """vLLM's draw has the request's own parameters, and no settings of ours."""


class Observed(Sampler):
    """vLLM's own draw, left as it is: records tell what vLLM draws with."""

    name = VLLM
    Settings = NoSettings

    def plan(self, rows: RowView) -> Plan:
        """The request's own parameters, which vLLM draws with itself."""
        return Plan(rows.base)

    def kernel_rule(self, backend: str) -> KernelRule | None:
        """The same in Triton."""
        if backend != "triton":
            return None
        from vllm_entropix.samplers.triton_.around_own import own

        return KernelRule(own)

    def bounds(self, numbers: Mapping[str, float], base: Mapping[str, float]) -> Bounds:
        """Nothing is written in its rows, so nothing of theirs widens what is done for others."""
        return Bounds(1)
