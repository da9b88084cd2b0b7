"""What entropix adds to a record."""

from __future__ import annotations

from vllm_entropix.records.fields import Field, register
from vllm_entropix.records.regimes import REGIMES

FIELDS = (
    Field(
        "regime", "category", "", True, "regime", "Kind of uncertainty that the model was in.", group="mark", categories=REGIMES
    ),
    Field("confidence", "float", "", True, "confidence", "Confidence score C."),
)
register("entropix", FIELDS)
