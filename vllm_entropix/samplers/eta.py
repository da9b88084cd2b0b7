"""eta: keep candidates by a floor that falls with the entropy (Hewitt, Manning and Liang, arXiv 2210.15191)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class EtaSettings(Section):
    """Settings of eta."""

    eta_cutoff: float = setting("ε of the floor min(ε, √ε·e^-H); 0 keeps all.", "probability", default=0.0, ge=0, le=1)


class Eta(Stage):
    """p ≥ min(ε, √ε·e^-H), H being the entropy of what is left, in nats."""

    name = "eta"
    aliases = ("eta_cutoff",)
    Settings = EtaSettings
    setting_aliases = (("eta", "eta_cutoff"),)
    neutral = (("eta_cutoff", 0.0, 0.0),)

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """ε of each row."""
        from vllm_entropix.distribution.survivors import entropy, keep, slack, softmax

        epsilon = rows["eta_cutoff"]
        floor = epsilon.minimum(epsilon.sqrt() * (-entropy(logits)).exp())
        return keep(logits, softmax(logits) >= floor * (1 - slack(logits)))
