"""Per-token trace records of one generated sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, overload

from vllm_entropix.records.fields import NUMBER_BYTES, names, record_bytes

if TYPE_CHECKING:
    import numpy as np

# Records that are made at a time of a trace that is gone through.
_CHUNK = 256


class TokenRecord:
    """Why one token was drawn as it was: a value with an attribute for each field of the table (``fields``).

    A number that wasn't measured or isn't finite is None, as is a field that the token's sampler doesn't have.

    Attributes:
        alternatives: most probable tokens as (id, probability), before temperature and filters, most probable first; the
            probability is None where the logits have no finite one.

    Args:
        values: all fields of the table by name, and ``alternatives`` if there are some.

    Raises:
        TypeError: a field is missing, or unknown.
    """

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, **values: Any) -> None:
        known = (*names(), "alternatives")
        values.setdefault("alternatives", ())
        if wrong := values.keys() ^ set(known):
            raise TypeError(f"a record has the fields {', '.join(known)}: missing or unknown is {', '.join(sorted(wrong))}")
        object.__setattr__(self, "_values", {name: values[name] for name in known})

    def __getattr__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(f"a record has no field {name!r}") from None

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a record can't be changed")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, TokenRecord) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._values.items()))

    def __repr__(self) -> str:
        return f"TokenRecord({', '.join(f'{name}={value!r}' for name, value in self._values.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _record, (self._values,)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {**self._values, "alternatives": [list(alternative) for alternative in self.alternatives]}


def _record(values: dict[str, Any]) -> TokenRecord:
    return TokenRecord(**values)


class TokenTrace:
    """The records of a generated sequence's tokens, one per token and in order; a value that pickles, copies and compares.

    A slice is a trace, too. ``not_kept`` stays with the slice that reaches the end.

    Args:
        width: bytes of a record: those of the table's fields (the default), and 8 per alternative.

    Attributes:
        not_kept: tokens that came after the server's cap (``trace.max_tokens``).
    """

    __slots__ = ("_data", "_width", "not_kept")
    __hash__ = None  # type: ignore[assignment]  # it can grow

    def __init__(self, width: int | None = None) -> None:
        self._data = bytearray()
        self._width = record_bytes() if width is None else width
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
        """The packed numbers, float32 ``[tokens, fields]``: those of the table, then ids and probabilities of alternatives."""
        import numpy as np  # here, because reading the traces of a response takes none

        return np.frombuffer(bytes(self._data), dtype="<f4").reshape(len(self), self._width // NUMBER_BYTES)

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
        first = index % len(self)
        [record] = self[first : first + 1]
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
