"""Mirostat: keep the surprise of the drawn tokens near a target (arXiv 2007.14966; llama.cpp's two versions).

μ, the surprise that is allowed, is a function of the tokens drawn before: μ -= η·(surprise - τ), beginning with 2τ. Surprise is
-log2 of the drawn token's probability after the cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_entropix.records.fields import Field
from vllm_entropix.samplers.stage import Branch, StageRows, StatefulStage
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor

# Ranks that the exponent of Zipf's law is estimated from.
_RANKS = 100


FIELDS = (
    Field(
        *("mu", "float", "bits", True, "μ", "Surprise that mirostat allowed."),
        buckets=(0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0),
    ),
)


class MirostatSettings(Section):
    """Settings of mirostat, of either version."""

    mirostat_tau: float = setting("Surprise τ that is aimed for.", "bits", default=5.0, ge=0, le=100)
    mirostat_eta: float = setting("Rate η at which μ follows the surprise.", default=0.1, ge=0, le=100)


class _Mirostat(StatefulStage):
    Settings = MirostatSettings
    follows = "after"
    last = True
    fields = FIELDS

    def initial(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """μ = 2τ."""
        return 2 * numbers["mirostat_tau"]

    def advance(self, state: Tensor, probability: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """μ -= η·(surprise - τ)."""
        return state - numbers["mirostat_eta"] * (-probability.log2() - numbers["mirostat_tau"])

    def told(self, before: Tensor, after: Sequence[Branch], rows: StageRows, drawn: Tensor) -> Mapping[str, Tensor]:
        """μ before the draw."""
        assert rows.state is not None
        return {"mu": rows.state.squeeze(-1)}


class Mirostat(_Mirostat):
    """Version 1: the k most probable candidates, k following from μ by Zipf's law.

    ŝ by least squares from the first 100 ranks, ε = ŝ - 1, k = (ε·2^μ / (1 - N^-ε))^(1/ŝ), N being the vocabulary.
    """

    name = "mirostat"
    aliases = ("mirostat_1", "mirostat_v1", "mirostat1")

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """The first int(k) candidates, at least one."""
        import torch

        from vllm_entropix.distribution.survivors import Ranked, count, keep

        assert rows.state is not None
        vocabulary = logits.shape[-1]
        ranked = Ranked.by_probability(logits)
        log_p = ranked.probabilities[:, :_RANKS].log()
        ranks = torch.arange(1, log_p.shape[-1], device=logits.device, dtype=logits.dtype)
        steps = ((ranks + 1) / ranks).log()
        counted = ranks < count(logits)
        falls = (log_p[:, :-1] - log_p[:, 1:]).where(counted, 0.0)
        exponent = (steps * falls).sum(-1, keepdim=True) / (steps.square() * counted).sum(-1, keepdim=True)
        epsilon = exponent - 1
        # (1 - N^-ε) / ε, which is ln N at ε = 0.
        scale = -torch.expm1(-epsilon * math.log(vocabulary)) / epsilon
        scale = scale.where(epsilon != 0, math.log(vocabulary))
        k = (torch.exp2(rows.state) / scale).pow(1 / exponent).nan_to_num(nan=1.0).floor()
        return keep(logits, ranked.by_token(torch.arange(vocabulary, device=logits.device) < k))


class MirostatV2(_Mirostat):
    """Version 2: the candidates whose surprise is at most μ, at least the most probable one."""

    name = "mirostat_v2"
    aliases = ("mirostat_2", "mirostat2")

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """-log2 p ≤ μ."""
        from vllm_entropix.distribution.survivors import keep, slack, softmax

        assert rows.state is not None
        return keep(logits, -softmax(logits).log2() <= rows.state + slack(logits))
