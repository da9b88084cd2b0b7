"""XTC, exclude top choices: now and then drop all likely candidates but the least likely of them (p-e-w; llama.cpp).

llama.cpp throws a coin and then draws. Both together are one distribution, the mixture (1 - π)·p + π·p_xtc, which this is: so
it stays exact under speculative decoding, and a seed means what it means elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_entropix.records.fields import Field
from vllm_entropix.samplers.stage import Branch, Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


FIELDS = (
    Field(
        "xtc_share",
        "float",
        "",
        True,
        "XTC's share",
        "Share of the distribution in which XTC excluded top choices; 0 where there were fewer than two.",
        buckets=(0.0, 0.1, 0.25, 0.5, 0.75, 0.9),
    ),
)


class XtcSettings(Section):
    """Settings of XTC."""

    xtc_probability: float = setting("How often top choices are excluded; 0 never.", "probability", default=0.0, ge=0, le=1)
    xtc_threshold: float = setting(
        "Probability of a top choice; above 0.5 nothing is excluded.",
        "probability",
        default=0.1,
        ge=0,
        le=1,
    )


class Xtc(Stage):
    """Where two or more candidates have p ≥ threshold, all of them but the least probable go, with the probability π."""

    name = "xtc"
    Settings = XtcSettings
    neutral = (("xtc_probability", 0.0, 0.0),)
    fields = FIELDS

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """What is left when the coin has fallen."""
        import torch

        from vllm_entropix.distribution.survivors import Ranked, slack

        ranked, threshold = Ranked.by_probability(logits), rows["xtc_threshold"]
        alive = logits.gather(-1, ranked.order) > -torch.inf
        top = alive & (ranked.probabilities >= threshold * (1 - slack(logits)))
        # The probabilities fall, so the least probable of the top choices is the one that no other of them follows.
        followed = torch.nn.functional.pad(top[:, 1:], (0, 1), value=False)
        return logits.masked_fill(ranked.by_token(followed & (threshold <= 0.5)), -torch.inf)

    def branches(self, logits: Tensor, rows: StageRows) -> list[Branch]:
        """What is left if nothing is excluded, and if the top choices are."""
        probability = rows["xtc_probability"]
        return [(1 - probability, logits), (probability, self.apply(logits, rows))]

    def told(self, before: Tensor, after: Sequence[Branch], rows: StageRows, drawn: Tensor) -> Mapping[str, Tensor]:
        """π where anything was excluded."""
        (_, whole), (share, excluded) = after
        return {"xtc_share": share.squeeze(-1) * (whole != excluded).any(dim=-1)}
