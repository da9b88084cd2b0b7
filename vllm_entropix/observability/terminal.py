"""Traces in the terminal: tokens coloured by regime, a legend, a table per sequence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from vllm_entropix.records import fields
from vllm_entropix.records.branches import Branch
from vllm_entropix.records.regimes import Regime, regime_of
from vllm_entropix.records.schema import TokenEntry
from vllm_entropix.records.trace import TokenRecord

FORCED_STYLE = "bold white on magenta"


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
        regime = regime_of(record)
        text.append(printable(piece), style=FORCED_STYLE if record.forced else regime.style if regime is not None else "")
    return text


def tree_of(branches: Sequence[Branch], text_of: Callable[[int], str]) -> Tree:
    """The branches of an answer that forked, each below the one that it parted from.

    Args:
        branches: the first one first.
        text_of: token → its text.
    """
    drawn: dict[int, Tree] = {}
    for branch in branches:
        label = Text()
        if branch.token is not None:
            label.append(f"{printable(text_of(branch.token))!r} ", style="bold")
            label.append(f"at token {branch.position + 1}, ")
        label.append(f"{branch.tokens} {'token' if branch.tokens == 1 else 'tokens'}")
        if branch.score is not None:
            label.append(f", score {branch.score:.2f}")
        if branch.chosen:
            label.append(", the answer", style="bold green")
        elif branch.pruned_at is not None:
            label.append(f", given up at token {branch.pruned_at}", style="dim")
        drawn[branch.id] = Tree(label) if branch.parent is None else drawn[branch.parent].add(label)
    return drawn[branches[0].id]


def legend() -> Text:
    """What the colours mean, in one line."""
    text = Text()
    for regime in Regime:
        text.append(f"{regime.name} ", style=regime.style)
        text.append(f"{regime.meaning}   ", style="dim")
    text.append(" forced ", style=FORCED_STYLE)
    text.append(" clarification", style="dim")
    return text


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.2f}" if known else "-"


# Columns of a name: at most these; and those that it has before a metric is left out for it.
_NAME_COLUMNS, _NAME_COLUMNS_KEPT = 48, 16


def summary_table(sequences: Sequence[TracedText], width: int) -> Table:
    """Regimes, mean metrics and forced tokens of each sequence. Where there is no room, the last metrics are left out.

    Args:
        sequences: one row each.
        width: columns of the terminal; what doesn't fit is left out or, of names, cut, but never a heading or a number.
    """
    names = [Text(printable(sequence.name)) for sequence in sequences]
    counts = [Counter(map(regime_of, sequence.records)) for sequence in sequences]
    columns = {
        "tokens": [str(len(sequence.records)) for sequence in sequences],
        **{regime.name: [str(count[regime]) if count[regime] else "·" for count in counts] for regime in Regime},
    }
    metrics = {
        _heading(field): [_mean(getattr(record, field.name) for record in sequence.records) for sequence in sequences]
        for field in fields.metrics()
    }
    forced = {"forced": [str(sum(record.forced for record in sequence.records) or "·") for sequence in sequences]}

    longest = max([len("sequence"), *(name.cell_len for name in names)])
    padding = 2  # spaces in a cell, of which the left one is dispensed with before a metric is
    while True:
        room = width - 1 - sum(_needed(column, padding) for column in ({"": [""]} | columns | metrics | forced).items())
        if room >= min(longest, _NAME_COLUMNS_KEPT) or not metrics:
            break
        if padding == 2:
            padding = 1
        else:
            metrics.popitem()
    table = Table(
        title="Regimes and metrics per sequence", title_justify="left", title_style="bold", padding=(0, 1, 0, padding - 1)
    )
    table.add_column("sequence", no_wrap=True, width=max(2, min(longest, _NAME_COLUMNS, room)))
    styles = {regime.name: regime.style for regime in Regime}
    for heading in columns | metrics | forced:
        table.add_column(heading, justify="right", style=styles.get(heading, ""), no_wrap=True)
    for row in zip(names, *(columns | metrics | forced).values(), strict=True):
        table.add_row(*row)
    return table


def _heading(field: fields.Field) -> str:
    """A field's label, a word a line, and its unit."""
    return "\n".join(filter(None, (*field.label.split(), field.unit)))


def _needed(column: tuple[str, Sequence[str]], padding: int) -> int:
    """Columns of the terminal that a column of the table takes, with the line before it."""
    heading, values = column
    return 1 + padding + max(map(len, (*heading.split("\n"), *values)))
