"""Per-token trace records of one generated sequence."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# The wire format's fields in order, little-endian float32 each (the names of sampling.batch.RECORD_FIELDS; spelled out here
# because a client that reads traces needs no torch).
FIELDS = (
    "regime",
    "entropy",
    "varentropy",
    "attention_entropy",
    "attention_varentropy",
    "agreement",
    "interaction_strength",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "confidence",
    "forced",
)
RECORD = struct.Struct(f"<{len(FIELDS)}f")
REGIMES = ("LELV", "HELV", "LEHV", "HEHV", "ADAPTIVE")


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """Why one token was drawn as it was.

    Attributes:
        regime: LELV, HELV, LEHV, HEHV or ADAPTIVE.
        entropy: of the next-token distribution, bits.
        varentropy: of the next-token distribution, bits².
        attention_entropy: mean over heads, bits; None if attention wasn't measured.
        attention_varentropy: variance over heads, bits²; None if attention wasn't measured.
        agreement: mean deviation of the heads from their mean; None if attention wasn't measured.
        interaction_strength: mean absolute attention score; None if attention wasn't measured.
        temperature: used for the draw; 0 is argmax.
        top_p: used for the draw.
        top_k: used for the draw.
        min_p: used for the draw.
        confidence: the score's constant C.
        forced: the token was forced as part of a clarification.
        alternatives: most probable tokens as (id, probability), before temperature and filters, most probable first.
    """

    regime: str
    entropy: float | None
    varentropy: float | None
    attention_entropy: float | None
    attention_varentropy: float | None
    agreement: float | None
    interaction_strength: float | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    confidence: float | None
    forced: bool
    alternatives: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_values(cls, values: Sequence[float]) -> TokenRecord:
        """A record from the wire format's numbers: the fields, then ids and probabilities of alternatives.

        Numbers that aren't finite become None.
        """
        extra = values[len(FIELDS) :]
        half = len(extra) // 2
        known = [value if math.isfinite(value) else None for value in values]
        return cls(
            regime=REGIMES[int(values[0])],
            entropy=known[1],
            varentropy=known[2],
            attention_entropy=known[3],
            attention_varentropy=known[4],
            agreement=known[5],
            interaction_strength=known[6],
            temperature=values[7],
            top_p=values[8],
            top_k=int(values[9]),
            min_p=values[10],
            confidence=known[11],
            forced=values[12] > 0,
            alternatives=tuple((int(token), p) for token, p in zip(extra[:half], extra[half:], strict=True)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


class TokenTrace:
    """The records of one generated sequence, one per token and in order; grows while the sequence does.

    Args:
        width: bytes of a record: those of FIELDS, and 8 per alternative.

    Attributes:
        not_kept: tokens that came after the server's cap (``trace.max_tokens``).
    """

    __slots__ = ("_data", "_record", "not_kept")

    def __init__(self, width: int = RECORD.size) -> None:
        self._data = bytearray()
        self._record = struct.Struct(f"<{width // 4}f")
        self.not_kept = 0

    def extend(self, records: bytes, tokens: int) -> None:
        """Append the records of ``tokens`` new tokens; there may be fewer records than tokens at the cap."""
        size = self._record.size
        kept = min(len(records), tokens * size)
        self._data += records[:kept]
        self.not_kept += tokens - kept // size

    def values(self) -> np.ndarray:
        """The wire format's numbers, float32 ``[tokens, fields]``: FIELDS, then ids and probabilities of alternatives."""
        import numpy as np  # here, because reading the traces of a response takes none

        return np.frombuffer(bytes(self._data), dtype="<f4").reshape(len(self), -1)

    def __len__(self) -> int:
        return len(self._data) // self._record.size

    def __getitem__(self, index: int) -> TokenRecord:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return TokenRecord.from_values(self._record.unpack_from(self._data, index % len(self) * self._record.size))

    def __iter__(self) -> Iterator[TokenRecord]:
        for values in self._record.iter_unpack(self._data):
            yield TokenRecord.from_values(values)

    def __repr__(self) -> str:
        return f"TokenTrace({len(self)} tokens)"


def traces(output: Any) -> list[TokenTrace | None]:
    """The trace of each completion of a vLLM RequestOutput, None where none was asked for."""
    return [getattr(completion, "entropix_trace", None) for completion in output.outputs]
