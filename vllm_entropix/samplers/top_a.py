"""top_a: keep candidates by the square of the largest probability (BlinkDL, RWKV-LM; text-generation-webui)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class TopASettings(Section):
    """Settings of top_a."""

    top_a: float = setting("Smallest probability per square of the largest; 0 keeps all.", default=0.0, ge=0, le=1)


class TopA(Stage):
    """p ≥ a·(max p)²."""

    name = "top_a"
    neutral = (("top_a", 0.0, 0.0),)
    Settings = TopASettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """a of each row."""
        from vllm_entropix.distribution.survivors import keep, slack, softmax

        probabilities = softmax(logits)
        floor = rows["top_a"] * probabilities.amax(dim=-1, keepdim=True).square()
        return keep(logits, probabilities >= floor * (1 - slack(logits)))
