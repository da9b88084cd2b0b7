"""EDT, entropy-based dynamic temperature: the surer, the colder (arXiv 2403.14541)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class EdtSettings(Section):
    """Settings of EDT."""

    temperature: float = setting("Temperature T0 of an even distribution; 0 or less is argmax.", default=0.8, ge=-100, le=100)
    edt_theta: float = setting("How far low entropies cool; 0 is plain temperature.", "nats", default=0.0, ge=0, le=100)


class Edt(Stage):
    """l / T with T = T0·0.8^(θ / H), H being the entropy of what is left, in nats."""

    name = "edt"
    aliases = ("entropy_dynamic_temperature",)
    neutral = (("edt_theta", 0.0, 0.0),)
    Settings = EdtSettings

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """A temperature per row, by the entropy of what is left."""
        from vllm_entropix.distribution.survivors import at_temperature, entropy

        theta, base = rows["edt_theta"], rows["temperature"]
        # Without entropy θ / H is infinite and T is 0.
        power = (theta / entropy(logits)).where(theta > 0, 0.0)
        return at_temperature(logits, base * (0.8**power))
