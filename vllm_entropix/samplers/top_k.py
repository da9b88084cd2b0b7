"""top_k: keep the k most probable candidates (Fan et al., arXiv 1805.04833)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class TopKSettings(Section):
    """Settings of top_k."""

    top_k: int = setting("Number of candidates to keep; 0 or less keeps all.", "tokens", default=40, ge=-1, lt=2**24)


class TopK(Stage):
    """The k largest logits, of equal ones those with the lower ids."""

    name = "top_k"
    Settings = TopKSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """k of each row; 0 or less keeps all."""
        import torch

        from vllm_entropix.distribution.survivors import Ranked, keep

        ranked, k = Ranked.by_probability(logits), rows["top_k"]
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        return keep(logits, ranked.by_token((ranks < k) | (k <= 0)))
