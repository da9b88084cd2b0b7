"""typ_p, locally typical sampling: keep candidates whose surprise is near the entropy (arXiv 2202.00666)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class TypPSettings(Section):
    """Settings of typ_p."""

    typ_p: float = setting("Probability to keep, the most typical first; 1 keeps all.", "probability", default=1.0, ge=0, le=1)


class TypP(Stage):
    """Candidates by ascending |-ln p - H|, through the one at which their sum exceeds typ_p.

    The most typical candidate always stays, and the most probable one need not.
    """

    name = "typ_p"
    aliases = ("typical_p", "typical", "typ")
    Settings = TypPSettings
    setting_aliases = (("typical_p", "typ_p"), ("typical", "typ_p"))
    neutral = (("typ_p", 1.0, 1.0),)

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """typ_p of each row; 1 keeps all."""
        import torch

        from vllm_entropix.distribution.survivors import Ranked, entropy, slack, softmax

        probabilities, typ_p = softmax(logits), rows["typ_p"]
        distance = (-probabilities.log() - entropy(logits)).abs().where(logits > -torch.inf, torch.inf)
        order = distance.sort(dim=-1, stable=True).indices
        ranked = Ranked(order, probabilities.gather(-1, order))
        kept = ranked.by_token((ranked.before() <= typ_p + slack(logits)) | (typ_p >= 1))
        return logits.where(kept, -torch.inf)
