"""p-less: keep candidates at least as probable as two draws are to agree (arXiv 2509.23234)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class PLessSettings(Section):
    """p-less has no settings."""


class PLess(Stage):
    """p ≥ Σp², the probability that two draws give one token."""

    name = "p_less"
    aliases = ("pless",)
    Settings = PLessSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """The threshold follows from each row's own probabilities."""
        from vllm_entropix.distribution.statistics import row_sums
        from vllm_entropix.distribution.survivors import keep, slack, softmax

        probabilities = softmax(logits)
        collision = row_sums(probabilities.square()).unsqueeze(-1)
        return keep(logits, probabilities >= collision * (1 - slack(logits)))
