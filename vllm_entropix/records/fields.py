"""The table of what a record holds: each field's name, what its number stands for, and what it means.

The wire format, :class:`~.trace.TokenRecord`, the JSON of :mod:`.encoding` and the schemas follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
# Of what a choice of a response carries.
VERSION = 1


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a record.

    Attributes:
        name: as in every format.
        kind: what its float32 stands for. ``regime``: the place in REGIMES; ``number``; ``count``: a whole number; ``flag``:
            true above 0. Numbers and counts that aren't finite (unmeasured, or of logits that aren't finite) are None in
            Python and null in JSON; regimes and flags always have a value.
        description: with unit.
    """

    name: str
    kind: Literal["regime", "number", "count", "flag"]
    description: str


# In the order of the wire format, a little-endian float32 each (the names are sampling.batch.RECORD_FIELDS; spelled out here
# because a client that reads traces needs no torch).
TABLE = (
    Field("regime", "regime", "Kind of uncertainty that the model was in."),
    Field("entropy", "number", "Entropy of the next-token distribution, bits."),
    Field("varentropy", "number", "Varentropy of the next-token distribution, bits²."),
    Field("attention_entropy", "number", "Attention entropy, mean over heads and observed layers, bits."),
    Field("attention_varentropy", "number", "Variance over heads of the attention entropy, bits²."),
    Field("agreement", "number", "Mean deviation of the heads from their mean; grows as they disagree."),
    Field("interaction_strength", "number", "Mean absolute attention score."),
    Field("temperature", "number", "Temperature of the draw; 0 is argmax."),
    Field("top_p", "number", "Nucleus mass of the draw."),
    Field("top_k", "count", "Number of candidates of the draw."),
    Field("min_p", "number", "Smallest probability of the draw, relative to the largest."),
    Field("confidence", "number", "Confidence score C."),
    Field("forced", "flag", "Forced as part of a clarification."),
)
FIELDS = tuple(field.name for field in TABLE)
DESCRIPTIONS = {field.name: field.description for field in TABLE}
ALTERNATIVES = "Most probable tokens as (id, probability), before temperature and filters; null: no finite probability."
REGIMES = ("LELV", "HELV", "LEHV", "HEHV", "ADAPTIVE")
