"""tfs, tail-free sampling: cut where the sorted probabilities stop bending (Phénix and Egan 2019; llama.cpp, koboldcpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class TfsSettings(Section):
    """Settings of tfs."""

    tfs_z: float = setting("Share of the curvature to keep; 1 keeps all.", default=1.0, ge=0, le=1)


class Tfs(Stage):
    """Second differences of the sorted probabilities, absolute, normalised and summed: what ranks before the sum exceeds z.

    One or two candidates stay as they are. Where there is no curvature to speak of (a sum of at most 1e-6), each difference
    counts the same.
    """

    name = "tfs"
    aliases = ("tfs_z", "tail_free", "tail-free")
    Settings = TfsSettings
    setting_aliases = (("tfs", "tfs_z"),)
    neutral = (("tfs_z", 1.0, 1.0),)

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """z of each row; 1 keeps all."""
        import torch

        from vllm_entropix.distribution.survivors import Ranked, count, keep, slack

        survivors, z = count(logits), rows["tfs_z"]
        if logits.shape[-1] <= 2:
            return logits
        ranked = Ranked.by_probability(logits)
        first = -ranked.probabilities.diff(dim=-1)
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        bends = (-first.diff(dim=-1)).abs().masked_fill(ranks[:-2] >= survivors - 2, 0.0)
        total = bends.cumsum(dim=-1)[:, -1:]
        even = (ranks[:-2] < survivors - 2) / (survivors - 2).clamp_min(1).to(logits.dtype)
        shares = (bends / total.where(total > 1e-6, 1.0)).where(total > 1e-6, even)
        reached = (shares.cumsum(dim=-1) <= z + slack(logits)) & (ranks[:-2] < survivors - 2)
        within = torch.nn.functional.pad(reached, (0, 2), value=False)
        # What is never exceeded keeps all.
        all_of_it = (z >= 1) | (survivors <= 2) | (within.sum(dim=-1, keepdim=True) >= survivors - 2)
        return keep(logits, ranked.by_token(within | all_of_it))
