"""The error of a wrong setting, and how a value is quoted in a message."""

from __future__ import annotations

import reprlib
from typing import Any


class ConfigError(ValueError):
    """A configuration that can't be used; the message is one sentence that names the setting and what is allowed."""


# Characters of a value that an error repeats.
QUOTED = 100


class _ShortRepr(reprlib.Repr):
    """Representations of a value's first parts alone, so that a large value costs no more than a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 8, 8, 8
        self.maxstring = self.maxlong = self.maxother = QUOTED

    def repr_int(self, value: int, level: int) -> str:
        try:
            return super().repr_int(value, level)
        except ValueError:  # Python writes no number of more than 4300 digits
            return "<a number of thousands of digits>"


_SHORT = _ShortRepr()


def quoted(value: Any) -> str:
    """``repr(value)`` for an error message, cut to 100 characters: what is refused may be megabytes long."""
    return cut(_SHORT.repr(value))


def cut(text: str, length: int = QUOTED) -> str:
    """``text`` if it has at most ``length`` characters, otherwise its beginning and an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
