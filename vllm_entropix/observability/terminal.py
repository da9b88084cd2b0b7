"""Traces in the terminal: tokens coloured by regime, a legend, a table per sequence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table
from rich.text import Text

from vllm_entropix.observability.schema import TokenEntry
from vllm_entropix.observability.trace import REGIMES, TokenRecord

# Colours that differ in lightness as well as in hue, for the colour-blind and for terminals with few colours.
STYLES = {
    "LELV": "green",
    "HELV": "bold magenta",
    "LEHV": "yellow",
    "HEHV": "bold red",
    "ADAPTIVE": "cyan",
}
FORCED_STYLE = "bold white on magenta"
MEANINGS = {
    "LELV": "sure: argmax",
    "HELV": "evenly lost: ask",
    "LEHV": "a fork: explore",
    "HEHV": "the mist: resample",
    "ADAPTIVE": "in between: adapt",
}


@dataclass(frozen=True)
class TracedText:
    """A generated sequence: the text of each token, and its record."""

    name: str
    texts: Sequence[str]
    records: Sequence[TokenRecord | TokenEntry]


# Control characters (but tabs and line feeds) and marks that turn the direction of what follows: they'd reach beyond the text.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that does nothing to a terminal but stand there: control characters are spelled out as ``<U+001B>``."""
    return _CONTROLS.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def coloured(sequence: TracedText) -> Text:
    """The text with each token in the colour of its regime; forced tokens stand out."""
    text = Text()
    for piece, record in zip(sequence.texts, sequence.records, strict=False):
        text.append(printable(piece), style=FORCED_STYLE if record.forced else STYLES[record.regime])
    return text


def legend() -> Text:
    """What the colours mean, in one line."""
    text = Text()
    for regime in REGIMES:
        text.append(f"{regime} ", style=STYLES[regime])
        text.append(f"{MEANINGS[regime]}   ", style="dim")
    text.append(" forced ", style=FORCED_STYLE)
    text.append(" clarification", style="dim")
    return text


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.2f}" if known else "-"


# Column of the table → the metric whose mean stands there.
_METRICS = {
    "entropy\nbits": "entropy",
    "varentropy\nbits²": "varentropy",
    "attention\nentropy": "attention_entropy",
    "agreement": "agreement",
    "interaction": "interaction_strength",
}


def summary_table(sequences: Sequence[TracedText], narrow: bool = False) -> Table:
    """Regimes, mean metrics and forced tokens of each sequence; ``narrow`` leaves most metrics out."""
    metrics = dict(list(_METRICS.items())[:1]) if narrow else _METRICS
    table = Table(title="Regimes and metrics per sequence", title_justify="left", title_style="bold")
    table.add_column("sequence", no_wrap=True)
    table.add_column("tokens", justify="right")
    for regime in REGIMES:
        table.add_column(regime, justify="right", style=STYLES[regime])
    for header in (*metrics, "forced"):
        table.add_column(header, justify="right")
    for sequence in sequences:
        records = sequence.records
        counts = Counter(record.regime for record in records)
        table.add_row(
            Text(printable(sequence.name)),
            str(len(records)),
            *(str(counts[regime]) if counts[regime] else "·" for regime in REGIMES),
            *(_mean(getattr(record, metric) for record in records) for metric in metrics.values()),
            str(sum(record.forced for record in records) or "·"),
        )
    return table
