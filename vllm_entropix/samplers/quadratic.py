"""quadratic, smoothing: bend the logits by a parabola around the largest (kalomaze; text-generation-webui, koboldcpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class QuadraticSettings(Section):
    """Settings of quadratic."""

    smoothing_factor: float = setting("Steepness of the parabola; 0 changes nothing.", default=0.0, ge=0, le=100)
    smoothing_curve: float = setting("Share of a cubic term; 1 has none.", default=1.0, ge=0, le=100)


class Quadratic(Stage):
    """max - k·f·d² + s·f·d³, d being l - max, k = (3 - curve) / 2 and s = (curve - 1) / 2."""

    name = "quadratic"
    aliases = ("smoothing", "smoothing_factor")
    neutral = (("smoothing_factor", 0.0, 0.0),)
    Settings = QuadraticSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """Factor and curve of each row."""
        import torch

        factor, curve = rows["smoothing_factor"], rows["smoothing_curve"]
        maximum = logits.amax(dim=-1, keepdim=True)
        alive = logits > -torch.inf
        below = (logits - maximum).where(alive, 0.0)
        bent = maximum + factor * below.square() * ((curve - 1) / 2 * below - (3 - curve) / 2)
        return bent.where(alive & (factor > 0), logits)
