"""epsilon: keep candidates at least so probable (Hewitt, Manning and Liang, arXiv 2210.15191)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class EpsilonSettings(Section):
    """Settings of epsilon."""

    epsilon_cutoff: float = setting("Smallest probability to keep; 0 keeps all.", "probability", default=0.0, ge=0, le=1)


class Epsilon(Stage):
    """p ≥ ε."""

    name = "epsilon"
    aliases = ("epsilon_cutoff",)
    Settings = EpsilonSettings
    setting_aliases = (("epsilon", "epsilon_cutoff"),)
    neutral = (("epsilon_cutoff", 0.0, 0.0),)

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """ε of each row."""
        from vllm_entropix.distribution.survivors import keep, slack, softmax

        return keep(logits, softmax(logits) >= rows["epsilon_cutoff"] * (1 - slack(logits)))
