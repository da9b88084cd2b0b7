"""The five regimes of entropix: number, name, meaning and colours, in one table."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class Regime(IntEnum):
    """Kind of uncertainty; the first four are tested in this order, ADAPTIVE is everything else.

    Attributes:
        meaning: what the model is, and what is done about it.
        style: its colour in a terminal. Styles differ in lightness as well as in hue, for the colour-blind and for terminals
            with few colours.
        light: its colour on a light page.
        dark: its colour on a dark page.
    """

    meaning: str
    style: str
    light: str
    dark: str

    LELV = 0, "sure: argmax", "green", "#1f8a4c", "#4cc38a"  # low entropy, low varentropy
    HELV = 1, "evenly lost: ask", "bold magenta", "#a626a4", "#e07be0"  # high entropy, low varentropy
    LEHV = 2, "a fork: explore", "yellow", "#b08800", "#e3c341"  # low entropy, high varentropy
    HEHV = 3, "the mist: resample", "bold red", "#cf2e2e", "#ff6b6b"  # high entropy, high varentropy
    ADAPTIVE = 4, "in between: adapt", "cyan", "#0b86a8", "#4fc4e0"

    def __new__(cls, number: int, meaning: str, style: str, light: str, dark: str) -> Regime:
        """A member of this number."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.meaning, member.style, member.light, member.dark = meaning, style, light, dark
        return member


REGIMES = tuple(Regime.__members__)


def regime_of(record: Any) -> Regime | None:
    """The regime of a TokenRecord or a TokenEntry; None if its sampler has no regimes."""
    name = getattr(record, "regime", None)
    return None if name is None else Regime[name]
