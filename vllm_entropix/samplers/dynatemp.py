"""dynatemp: a temperature that follows the entropy (koboldcpp, llama.cpp's temp-ext)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class DynatempSettings(Section):
    """Settings of dynatemp."""

    temperature: float = setting("Middle of the temperatures; 0 or less counts as 0.", default=0.8, ge=-100, le=100)
    dynatemp_range: float = setting("How far temperatures go to either side; 0 is temperature.", default=0.0, ge=0, le=100)
    dynatemp_exponent: float = setting("Bends the way from entropy to temperature.", default=1.0, ge=0, le=100)


class Dynatemp(Stage):
    """l / T with T = lo + (hi - lo)·(H / ln n)^e, lo = max(0, T0 - range), hi = T0 + range; n survivors of entropy H.

    A single survivor stays as it is. Without a range it is the temperature T0.
    """

    name = "dynatemp"
    aliases = ("dynamic_temperature",)
    neutral = (("dynatemp_range", 0.0, 0.0),)
    Settings = DynatempSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """A temperature per row, by the entropy of what is left."""
        from vllm_entropix.distribution.survivors import at_temperature, count, entropy

        middle, reach = rows["temperature"], rows["dynatemp_range"]
        survivors = count(logits)
        most = survivors.to(logits.dtype).log()
        share = (entropy(logits) / most.where(survivors > 1, 1.0)).clamp(0.0, 1.0)
        low, high = (middle - reach).clamp_min(0.0), middle + reach
        dynamic = low + (high - low) * share.pow(rows["dynatemp_exponent"])
        temperature = dynamic.where(reach > 0, middle)
        return at_temperature(logits, temperature.where((survivors > 1) | (reach <= 0), 1.0))
