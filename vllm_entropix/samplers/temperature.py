"""temperature: divide the logits (Ackley, Hinton and Sejnowski 1985; llama.cpp's temp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class TemperatureSettings(Section):
    """Settings of temperature."""

    temperature: float = setting("Divides the logits; 0 or less takes the most probable token.", default=0.8, ge=-100, le=100)


class Temperature(Stage):
    """l / T; T ≤ 0 keeps the most probable candidate alone.

    As in llama.cpp, a chain whose temperature is given a ``dynatemp_range`` has dynatemp in its place.
    """

    name = "temperature"
    aliases = ("temp",)
    Settings = TemperatureSettings
    setting_aliases = (("temp", "temperature"),)

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """One temperature per row."""
        from vllm_entropix.distribution.survivors import at_temperature

        return at_temperature(logits, rows["temperature"])
