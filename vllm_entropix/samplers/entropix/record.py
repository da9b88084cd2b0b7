"""What entropix adds to a record, and to a line of a trace file."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict
from pydantic import Field as Described

from vllm_entropix.records.fields import Field
from vllm_entropix.records.line import SamplerPart
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.samplers.entropix.settings import EntropixConfig, Thresholds

FIELDS = (
    Field(
        "regime", "category", "", True, "regime", "Kind of uncertainty that the model was in.", group="mark", categories=REGIMES
    ),
    Field("confidence", "float", "", True, "confidence", "Confidence score C."),
)


class EntropixPart(SamplerPart):
    """What a line tells of entropix and its settings."""

    model_config = ConfigDict(extra="ignore")

    name: Literal["entropix"] = Described("entropix", description="Name of the sampler.")
    preset: str | None = Described(None, description="Preset of the sequence's constants; null: not known.")
    fidelity: str | None = Described(None, description="corrected or original; null: not known.")
    thresholds: Thresholds | None = Described(None, description="Borders of the regimes that were used; null: not known.")

    @classmethod
    def from_config(cls, config: EntropixConfig) -> Self:
        """What is told of the settings that a sequence ran with, its own preset included."""
        return cls(preset=config.preset_name, fidelity=config.fidelity, thresholds=config.thresholds)
