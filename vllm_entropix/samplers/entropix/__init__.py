"""Entropix: what to do with a row, from entropy and varentropy of its logits and from its attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_entropix.records.regimes import Regime
from vllm_entropix.samplers.base import Bounds, KernelRule, Plan, RowView, Sampler
from vllm_entropix.samplers.entropix.record import FIELDS, EntropixPart
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_entropix.distribution.attention import AttentionStatistics
    from vllm_entropix.samplers.entropix.sampler import EntropixSampler

# PyTorch takes ten times as long to compare with a member of an enumeration as with its number.
_LELV = int(Regime.LELV)


class Entropix(Sampler):
    """Regimes by uncertainty, around the base temperature, top_p, top_k and min_p.

    Its settings stand beside the server's common ones rather than in a section: they were there first.
    """

    name = "entropix"
    Settings = EntropixConfig
    fields = FIELDS
    Part = EntropixPart

    def __init__(self, server: Any) -> None:
        self.settings: EntropixConfig = server
        self._sampler = _sampler(self.settings)

    def plan(self, rows: RowView) -> Plan:
        """Classify, measure attention where a regime reads it, and follow the regime's rule."""
        regime, attention, parameters, confidence = self._sampler.rule(
            rows.statistics, lambda regime: rows.attention(regime != _LELV), rows.settings, rows.backend.name
        )
        return Plan(
            parameters,
            order=self.settings.fidelity,
            forces=self._sampler.asks(regime, rows.statistics, rows.settings),
            attention=attention,
            fields={"regime": regime, "confidence": confidence},
        )

    def kernel_rule(self, backend: str) -> KernelRule | None:
        """The rule in Triton."""
        if backend != "triton" or not self._sampler.uses_kernels:
            return None
        from vllm_entropix.samplers.entropix.triton_rule import plan, plan_without_regimes, reads_attention

        return KernelRule(plan if self.settings.regimes else plan_without_regimes, self.settings.fidelity, reads_attention)

    def numbers(self) -> list[tuple[str, float]]:
        """All numbers of the configuration, by dotted name, and last those of experiments that are on."""
        return [*self.settings.numbers(), *self.settings.experiments.numbers()]

    def numbers_of_request(self, request: Any, own: Mapping[str, float]) -> list[float]:
        """Those of the request's preset, around its own base parameters where it asks for them."""
        given = request.own_constants or {}
        shares = (given.get(name, share) for name, share in self.settings.experiments.numbers())
        return [*request.constants(self.settings, own), *shares]

    def described(self, request: Any) -> EntropixPart:
        """Preset, fidelity and thresholds of the request's draws."""
        return EntropixPart.from_config(request.config(self.settings))

    @classmethod
    def label(cls, request: Any, server: Mapping[str, Any]) -> str:
        """The preset's name."""
        return str(request.preset or server["preset"])

    def bounds(self, numbers: Mapping[str, float], base: Mapping[str, float]) -> Bounds:
        """The widest top_k of any regime."""
        top_k = numbers["base.top_k"]
        # Agreement is never negative, so LEHV widens by its slope at most.
        lehv = max(numbers["lehv.top_k_min"], top_k * (1 + max(0.0, numbers["lehv.top_k_disagreement"])))
        drawn = numbers["adaptive.top_k_max"]
        if numbers["adaptive.top_k_interaction"] <= 0 <= numbers["adaptive.top_k_agreement"]:  # neither metric is negative
            drawn = min(drawn, max(top_k, numbers["adaptive.top_k_min"]))
        return Bounds(math.ceil(max(top_k, lehv, drawn)), math.ceil(drawn))


def _sampler(config: EntropixConfig) -> EntropixSampler:
    """Decides for the rows of a server of these settings."""
    from vllm_entropix.samplers.entropix.experiments import ExperimentalSampler
    from vllm_entropix.samplers.entropix.sampler import EntropixSampler

    return ExperimentalSampler(config) if config.experiments.change_rules else EntropixSampler(config)


class EntropixStageSettings(Section):
    """Settings of entropix in a chain: those of the server, or of its default preset, hold."""


class EntropixStage(Stage):
    """A temperature and filters by the uncertainty of what is left: entropix in the place of a temperature.

    In a notebook it runs on the logits alone, with its default preset.
    """

    name = "entropix"
    Settings = EntropixStageSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """Logarithms of the probabilities that entropix gives to what is left."""
        import torch

        from vllm_entropix.distribution.backend import Backend
        from vllm_entropix.distribution.constants import Constants
        from vllm_entropix.distribution.shape import shape
        from vllm_entropix.samplers.entropix.sampler import EntropixSampler

        config = rows.server if isinstance(rows.server, EntropixConfig) else EntropixConfig.preset()
        statistics = Backend(logits.device).statistics(logits)
        constants = rows.constants or Constants.from_config(config, statistics.entropy.dtype, logits.device)

        def attention(regime: Tensor) -> AttentionStatistics | None:
            return None if rows.measure is None else rows.measure(regime != _LELV)

        _, _, parameters, _ = EntropixSampler(config, kernels=False).rule(statistics, attention, constants, Backend.name)
        # A device isn't asked how wide the widest row is.
        count = int(parameters.top_k.max()) if logits.device.type == "cpu" else logits.shape[-1]
        kept, probabilities = shape(logits, parameters, config.fidelity, count)
        nothing = torch.full_like(logits, -torch.inf)
        return nothing.scatter_(-1, kept.token_ids, probabilities.log().to(logits.dtype))
