"""top-H: keep the most probable candidates of a bounded entropy (arXiv 2509.02510)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class TopHSettings(Section):
    """Settings of top-H."""

    top_h: float = setting("Entropy to keep, of the entropy of what is left; 1 keeps all.", default=1.0, ge=0, le=1)


class TopH(Stage):
    """Candidates by descending probability, as long as the entropy of those taken, renormalised, is at most h·H."""

    name = "top_h"
    neutral = (("top_h", 1.0, 1.0),)
    Settings = TopHSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """h of each row; 1 keeps all."""
        import torch

        from vllm_entropix.distribution.survivors import Ranked, entropy, keep, slack

        ranked, top_h = Ranked.by_probability(logits), rows["top_h"]
        mass = ranked.probabilities.cumsum(dim=-1)
        # Σ -q ln q of the first, where q = p / mass.
        taken = mass.log() + torch.special.entr(ranked.probabilities).cumsum(dim=-1) / mass
        within = taken <= top_h * entropy(logits) + slack(logits)
        # The first that exceeds it ends the set, whatever follows.
        within = within.to(torch.int8).cummin(dim=-1).values > 0
        return keep(logits, ranked.by_token(within | (top_h >= 1)))
