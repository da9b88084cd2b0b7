"""A GGUF file read in place: what it says about its model, and its tensors.

gguf's own reader makes an array of every token, for seconds: of the 262144 of Gemma for more than ten.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Kinds of values by their number: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # where the file doesn't say


class Tensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
        shape: in PyTorch's order.
        kind: how its values are quantised, a number of gguf.GGMLQuantizationType.
        start: of its bytes in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


class GGUFFile:
    """A whole file of a known checksum.

    Attributes:
        metadata: by key; of an array the number of its elements alone.
        tensors: by name.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._bytes)
        _magic, _version, tensors, entries = cursor.numbers("IIQQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.text()
            [kind] = cursor.numbers("I")
            self.metadata[key] = cursor.value(kind)
        found = {}
        for _ in range(tensors):
            name = cursor.text()
            [dimensions] = cursor.numbers("I")
            *shape, kind, offset = cursor.numbers(f"{dimensions}QIQ")
            found[name] = Tensor(tuple(reversed(shape)), kind, offset)
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        data = math.ceil(cursor.at / alignment) * alignment
        self.tensors = {name: tensor._replace(start=data + tensor.start) for name, tensor in found.items()}

    def values(self, name: str) -> np.ndarray:
        """A tensor's values, float32 of its shape; they may be read-only."""
        from gguf import GGMLQuantizationType, dequantize
        from gguf.quants import quant_shape_to_byte_shape

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        stored = quant_shape_to_byte_shape(tensor.shape, kind)
        return dequantize(np.frombuffer(self._bytes, np.uint8, math.prod(stored), tensor.start).reshape(stored), kind)


class _Cursor:
    """Reads values one behind the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.at = 0
        self._data = data

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """What a layout of struct's says, little-endian."""
        layout = f"<{layout}"
        found = struct.unpack_from(layout, self._data, self.at)
        self.at += struct.calcsize(layout)
        return found

    def text(self) -> str:
        [length] = self.numbers("Q")
        self.at += length
        return self._data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        """A value of a kind; of an array the number of its elements."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(_NUMBERS[kind])[0]
        kind, count = self.numbers("IQ")
        if kind != _STRING:
            self.at += count * struct.calcsize(f"<{_NUMBERS[kind]}")
        else:
            for _ in range(count):
                [length] = self.numbers("Q")
                self.at += length
        return count
