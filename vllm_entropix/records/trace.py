"""Per-token trace records of one generated sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from vllm_entropix.records.fields import FIELDS, REGIMES

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FIELDS", "RECORD_BYTES", "REGIMES", "TokenRecord", "TokenTrace", "traces"]

_NUMBER_BYTES = 4
# Of a record without alternatives.
RECORD_BYTES = _NUMBER_BYTES * len(FIELDS)
# Records that are made at a time of a trace that is gone through.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """Why one token was drawn as it was; a number that wasn't measured or isn't finite is None.

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
        alternatives: most probable tokens as (id, probability), before temperature and filters, most probable first; the
            probability is None where the logits have no finite one.
    """

    regime: str
    entropy: float | None
    varentropy: float | None
    attention_entropy: float | None
    attention_varentropy: float | None
    agreement: float | None
    interaction_strength: float | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    confidence: float | None
    forced: bool
    alternatives: tuple[tuple[int, float | None], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "alternatives": [list(alternative) for alternative in self.alternatives]}


class TokenTrace:
    """The records of a generated sequence's tokens, one per token and in order; a value that pickles, copies and compares.

    A slice is a trace, too. ``not_kept`` stays with the slice that reaches the end.

    Args:
        width: bytes of a record: those of FIELDS, and 8 per alternative.

    Attributes:
        not_kept: tokens that came after the server's cap (``trace.max_tokens``).
    """

    __slots__ = ("_data", "_width", "not_kept")
    __hash__ = None  # type: ignore[assignment]  # it can grow

    def __init__(self, width: int = RECORD_BYTES) -> None:
        self._data = bytearray()
        self._width = width
        self.not_kept = 0

    def extend(self, records: bytes, tokens: int) -> None:
        """Append the records of ``tokens`` new tokens; there may be fewer records than tokens at the cap."""
        kept = min(len(records), tokens * self._width)
        self._data += records[:kept]
        self.not_kept += tokens - kept // self._width

    def join(self, other: TokenTrace) -> None:
        """Append the trace of the tokens that came next."""
        self._data += other._data
        self.not_kept += other.not_kept

    def values(self) -> np.ndarray:
        """The wire format's numbers, float32 ``[tokens, fields]``: FIELDS, then ids and probabilities of alternatives."""
        import numpy as np  # here, because reading the traces of a response takes none

        return np.frombuffer(bytes(self._data), dtype="<f4").reshape(len(self), self._width // _NUMBER_BYTES)

    @property
    def nbytes(self) -> int:
        """What the records take in memory."""
        return len(self._data)

    def __len__(self) -> int:
        return len(self._data) // self._width

    @overload
    def __getitem__(self, index: int) -> TokenRecord: ...
    @overload
    def __getitem__(self, index: slice) -> TokenTrace: ...
    def __getitem__(self, index: int | slice) -> TokenRecord | TokenTrace:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a trace's slices are of tokens that follow one another")
            part = TokenTrace(self._width)
            part._data += self._data[start * self._width : stop * self._width]
            part.not_kept = self.not_kept if stop == len(self) else 0
            return part
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = index % len(self)
        [record] = self[place : place + 1]
        return record

    def __iter__(self) -> Iterator[TokenRecord]:
        from vllm_entropix.records.encoding import record_values  # numpy, as above

        for start in range(0, len(self), _CHUNK):
            for record in record_values(self[start : start + _CHUNK].values()):
                yield TokenRecord(**{**record, "alternatives": tuple(record["alternatives"])})

    def __copy__(self) -> TokenTrace:
        return self[:]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenTrace):
            return NotImplemented
        return (self._data, self._width, self.not_kept) == (other._data, other._width, other.not_kept)

    def __repr__(self) -> str:
        return f"TokenTrace({len(self)} tokens)"


def traces(output: Any) -> list[TokenTrace | None]:
    """The trace of each completion of a vLLM RequestOutput, None where none was asked for."""
    return [getattr(completion, "entropix_trace", None) for completion in output.outputs]
