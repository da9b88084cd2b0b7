"""greedy_threshold: take the most probable token where the model isn't sure of it (arXiv 2510.05987)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class GreedyThresholdSettings(Section):
    """Settings of greedy_threshold."""

    greedy_threshold: float = setting(
        "Confidence below which the most probable token is taken; 0 never does.", "probability", default=0.3, ge=0, le=1
    )


class GreedyThreshold(Stage):
    """Where max p < threshold, the most probable candidate alone; elsewhere nothing changes."""

    name = "greedy_threshold"
    neutral = (("greedy_threshold", 0.0, 0.0),)
    Settings = GreedyThresholdSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """The threshold of each row."""
        from vllm_entropix.distribution.survivors import keep, softmax

        return keep(logits, softmax(logits).amax(dim=-1, keepdim=True) >= rows["greedy_threshold"])
