"""What stands out among many traces: a name for each, how much there is to see in it, and figures over all of them."""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_entropix.records.fields import all_fields
from vllm_entropix.records.line import TraceLine
from vllm_entropix.records.regimes import Regime, regime_of
from vllm_entropix.records.schema import TokenEntry

TITLE_CHARACTERS = 64
UNCERTAIN_TOKENS = 40
CONTEXT_CHARACTERS = (48, 24)  # shown before and behind an uncertain token
BINS = 40

# What chat templates put around messages: special tokens, and roles that stand alone in a line.
_SPECIAL = re.compile(
    r"<[|\uff5c][^<>]{1,60}?[|\uff5c]>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad)>|\[/?(?:INST|SYSTEM_PROMPT)\]|<</?SYS>>"
)
_ROLE = re.compile(r"^\s*(?:system|developer|user|human|assistant|model|tool)\s*$", re.MULTILINE)


def sequence_title(line: TraceLine) -> str:
    """First words of the sequence's prompt if the line holds it, of the answer otherwise: a name that a person knows.

    The words are those of a chat's last message. Where there are none at all, the request's id stands in for them.
    """
    messages = (message for part in _SPECIAL.split(line.prompt or "") for message in _ROLE.split(part))
    last = next((message for message in reversed(list(messages)) if re.search(r"\w", message)), "")
    return first_words(last) or first_words(_SPECIAL.sub(" ", answer_start(line))) or line.request_id


def first_words(text: str) -> str:
    """How a text begins, in one line."""
    words = " ".join(text[: 8 * TITLE_CHARACTERS].split())
    if len(words) <= TITLE_CHARACTERS:
        return words
    whole = words[:TITLE_CHARACTERS].rpartition(" ")[0]
    return (whole if len(whole) > TITLE_CHARACTERS // 2 else words[: TITLE_CHARACTERS - 2]) + " …"


def _last_words(text: str, characters: int) -> str:
    """The end of a text, from a space on where it is cut."""
    end = text[-characters:]
    return end if len(text) <= characters else end[max(0, end.find(" ")) :]


def _next_words(text: str, characters: int) -> str:
    """The beginning of a text, up to a space where it is cut."""
    begin = text[:characters]
    return begin if len(text) <= characters else begin[: begin.rfind(" ")] if " " in begin else begin


def answer_start(line: TraceLine, characters: int = 8 * TITLE_CHARACTERS) -> str:
    """How the generated text begins."""
    return "".join(line.texts)[:characters]


def interest(line: TraceLine) -> tuple[int, int, float]:
    """How much there is to see in a sequence; compares greater for more.

    Returns:
        Number of kinds of tokens (regimes, and forced ones), of tokens outside LELV, and the sum of entropies in bits.
    """
    counts = Counter(map(regime_of, line.records))
    forced = any(entry.forced for entry in line.records)
    entropy = math.fsum(entry.entropy for entry in line.records if entry.entropy is not None)
    return len(counts) + forced, len(line.records) - counts[Regime.LELV], entropy


def kind_of(entry: TokenEntry) -> int:
    """The number of a token's regime; the number of regimes if it has none."""
    regime = regime_of(entry)
    return len(Regime) if regime is None else int(regime)


@dataclass(frozen=True, order=True)
class Uncertain:
    """One of the most uncertain tokens; greater is more uncertain, and earlier among equals.

    Attributes:
        entropy: bits.
        sequence: number of its sequence, negative.
        token: index in its sequence, negative.
        regime: number of its regime, or of regimes if it has none.
        varentropy: bits², if measured.
        text: of the token; ``before`` and ``behind`` are what stands around it.
    """

    entropy: float
    sequence: int
    token: int
    regime: int
    varentropy: float | None
    text: str
    before: str
    behind: str


class Overview:
    """Figures over all sequences of some files, gathered one sequence at a time."""

    def __init__(self) -> None:
        self._values: list[dict[str, list[np.ndarray]]] = []  # of each file and metric
        self._uncertain: list[Uncertain] = []
        self._sequences = 0
        # What is worth a histogram to Prometheus is worth one here.
        self._drawn = tuple(field.name for field in all_fields() if field.buckets)

    def add(self, file: int, line: TraceLine) -> None:
        """Take in a sequence of a file; files are numbered in order.

        A branch that was given up for another has a number alone: it repeats what it shares with the answer.
        """
        while len(self._values) <= file:
            self._values.append({name: [] for name in self._drawn})
        if line.is_answer:
            self._take_in(file, line)
        self._sequences += 1

    def _take_in(self, file: int, line: TraceLine) -> None:
        for metric, parts in self._values[file].items():
            values = np.array([getattr(entry, metric) for entry in line.records], dtype=np.float32)  # None becomes NaN
            parts.append(values[np.isfinite(values)])
        self._uncertain = heapq.nlargest(UNCERTAIN_TOKENS, [*self._uncertain, *self._most_uncertain(line)])

    def _most_uncertain(self, line: TraceLine) -> list[Uncertain]:
        floor = self._uncertain[-1].entropy if len(self._uncertain) == UNCERTAIN_TOKENS else 0.0
        above = [(entry.entropy, -index) for index, entry in enumerate(line.records) if (entry.entropy or 0.0) > floor]
        found = []
        for entropy, negative in heapq.nlargest(UNCERTAIN_TOKENS, above):
            index, entry = -negative, line.records[-negative]
            before, behind = CONTEXT_CHARACTERS
            found.append(
                Uncertain(
                    entropy=entropy or 0.0,
                    sequence=-self._sequences,
                    token=-index,
                    regime=kind_of(entry),
                    varentropy=entry.varentropy,
                    text="".join(line.texts[index : index + 1]),
                    before=_last_words("".join(line.texts[max(0, index - before) : index]), before),
                    behind=_next_words("".join(line.texts[index + 1 : index + 1 + behind]), behind),
                )
            )
        return found

    def uncertain(self) -> list[dict[str, Any]]:
        """The most uncertain tokens of all sequences as JSON objects, most uncertain first."""
        return [
            {
                "sequence": -token.sequence,
                "token": -token.token,
                "regime": token.regime,
                "entropy": _rounded(token.entropy),
                "varentropy": None if token.varentropy is None else _rounded(token.varentropy),
                "text": token.text,
                "before": token.before,
                "behind": token.behind,
            }
            for token in self._uncertain
        ]

    def histograms(self) -> list[dict[str, Any]]:
        """Histograms of the fields that have buckets as JSON objects.

        Each has ``field``, ``top`` (upper end), and of each file ``counts`` and ``means``.

        Bins are equally wide in the square root of the value: most tokens are near 0, and the few far from it are what matters.
        """
        made = []
        for metric in self._drawn:
            files = [np.concatenate(values[metric]) if values[metric] else np.empty(0, np.float32) for values in self._values]
            top = max((float(values.max()) for values in files if values.size), default=0.0)
            if top <= 0:  # not measured, or all the same
                continue
            edges = np.linspace(0, math.sqrt(top), BINS + 1)
            made.append(
                {
                    "field": metric,
                    "top": top,
                    "counts": [
                        np.histogram(np.sqrt(values.clip(0, top), dtype=np.float64), edges)[0].tolist() for values in files
                    ],
                    "means": [_rounded(float(values.mean(dtype=np.float64))) if values.size else None for values in files],
                }
            )
        return made


def _rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
