"""top_p, nucleus sampling: keep the most probable candidates that together have p (arXiv 1904.09751)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class TopPSettings(Section):
    """Settings of top_p."""

    top_p: float = setting("Probability to keep, of what is left; 1 keeps all.", "probability", default=0.95, ge=0, le=1)


class TopP(Stage):
    """Candidates by descending probability, through the one at which their sum reaches p."""

    name = "top_p"
    aliases = ("nucleus",)
    Settings = TopPSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """p of each row; 1 keeps all."""
        from vllm_entropix.distribution.survivors import Ranked, keep, slack

        ranked, top_p = Ranked.by_probability(logits), rows["top_p"]
        return keep(logits, ranked.by_token((ranked.before() < top_p - slack(logits)) | (top_p >= 1)))
