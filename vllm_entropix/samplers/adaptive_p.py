"""adaptive_p: prefer tokens whose probability is near a target that makes up for those drawn before (llama.cpp, PR 17927)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_entropix.records.fields import Field
from vllm_entropix.samplers.stage import Branch, StageRows, StatefulStage
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor

# llama.cpp's constants: the logit at the target, how steeply it falls, and the distance that counts as 1.
_PEAK, _SHARPNESS, _WIDTH = 5.0, 10.0, 0.3


FIELDS = (
    Field(
        "adaptive_average",
        "float",
        "",
        True,
        "adaptive_p's average",
        "Average probability of the tokens drawn before, which adaptive_p makes up for.",
        buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    ),
)


class AdaptivePSettings(Section):
    """Settings of adaptive_p."""

    adaptive_target: float = setting("Probability that is aimed for; below 0 nothing changes.", default=-1.0, ge=-1, le=1)
    adaptive_decay: float = setting("Share of the average that a token leaves.", default=0.9, ge=0, le=0.99)


class AdaptiveP(StatefulStage):
    """New logits 5 - 10·d² / (1 + d), d = |p - t| / 0.3, t = clamp(2·target - average).

    The average is exponential, over the probabilities that the drawn tokens had before this stage, and begins with the target.
    """

    name = "adaptive_p"
    neutral = (("adaptive_target", -1.0, -5e-324),)  # below 0
    fields = FIELDS
    Settings = AdaptivePSettings
    follows = "before"
    last = True

    def initial(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """The target, as if it had been met always."""
        return numbers["adaptive_target"].clamp_min(0.0)

    def advance(self, state: Tensor, probability: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """The average moves to the drawn token's probability."""
        decay = numbers["adaptive_decay"]
        return decay * state + (1 - decay) * probability

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """Target and average of each row."""
        import torch

        from vllm_entropix.distribution.survivors import softmax

        assert rows.state is not None
        target = rows["adaptive_target"]
        adapted = (2 * target - rows.state).clamp(0.0, 1.0)
        distance = (softmax(logits) - adapted).abs() / _WIDTH
        moved = _PEAK - _SHARPNESS * distance.square() / (1 + distance)
        return moved.where((logits > -torch.inf) & (target >= 0), logits)

    def told(self, before: Tensor, after: Sequence[Branch], rows: StageRows, drawn: Tensor) -> Mapping[str, Tensor]:
        """The average that the target was moved by."""
        assert rows.state is not None
        return {"adaptive_average": rows.state.squeeze(-1)}
