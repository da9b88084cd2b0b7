"""Traces as one HTML file that opens without a network: text by regime, the entropy × varentropy plane, metrics, alternatives.

What came from a model is only ever data: compressed columns in base64 per sequence, unpacked in the browser when the sequence
is looked at, and put on the page as text. A content security policy names the page's own scripts by their hashes, so that
nothing else runs and nothing is fetched.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np
from pydantic import BaseModel

from vllm_entropix._version import __version__
from vllm_entropix.observability.overview import Overview, answer_start, interest, kind_of, sequence_title
from vllm_entropix.observability.page import json_for_script, plotly_script, script_hash, template
from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.records.fields import Field, metrics, parameters
from vllm_entropix.records.line import TraceLine
from vllm_entropix.records.regimes import Regime
from vllm_entropix.records.scores import SCORES
from vllm_entropix.settings.errors import ConfigError

TEMPLATES = ("report.html.j2", "report.css", "report.js")
SNIPPET_CHARACTERS = 90
# Significant digits: of metrics and parameters (at most 4 fit a column), and of the probabilities of alternatives.
DIGITS = 4
PROBABILITY_DIGITS = 3
# Name, meaning and colours (light, dark) of the tokens of samplers without regimes; they stand behind the regimes.
WITHOUT_REGIME = {"name": "NONE", "meaning": "a sampler without regimes", "light": "#6b7280", "dark": "#9ca3af"}


@dataclass
class Source:
    """Traces that belong together, as those of a file.

    Attributes:
        name: shown in the report.
        lines: read once, one after the other.
        left_out: lines of the file that aren't traces; known once all have been read.
    """

    name: str
    lines: Iterable[TraceLine]
    left_out: int = 0

    @classmethod
    def of_file(cls, path: Path, progress: Callable[[int], object] | None = None) -> Self:
        """The traces of a file, as :func:`~.tracefile.read_traces` reads it; ``-`` is standard input."""
        source = cls("standard input" if str(path) == "-" else path.name, ())
        source.lines = read_traces(path, progress, lambda number: setattr(source, "left_out", number), branches=True)
        return source


@dataclass
class _Payload:
    """What the page's script gets: an index of all sequences, with the data of each packed.

    The sequence to open on is packed beside the index, all others behind the script: it begins before they have been read.
    """

    files: list[str] = field(default_factory=list)
    sequences: list[dict[str, Any]] = field(default_factory=list)
    borders: list[dict[str, Any]] = field(default_factory=list)
    overview: Overview = field(default_factory=Overview)
    without_regime: bool = False
    _packed: list[str] = field(default_factory=list)
    _interests: list[tuple[int, int, float]] = field(default_factory=list)
    # Of the last sequence: what all branches of an answer have in common, and its own branch.
    _last: tuple[tuple[int, str, int], int] | None = None
    _answers: int = 0
    # By model: texts of alternatives by token id, which its sequences share.
    _vocabularies: dict[str | None, dict[int, str]] = field(default_factory=dict)

    def add(self, file: int, line: TraceLine) -> None:
        thresholds = line.of_sampler("thresholds", BaseModel)  # neither a saved response nor another sampler tells them
        borders = thresholds.model_dump() if thresholds is not None else None
        if borders and borders not in self.borders:
            self.borders.append(borders)
        counts = Counter(map(kind_of, line.records))
        self.without_regime = self.without_regime or counts[len(Regime)] > 0
        vocabulary = self._vocabularies.setdefault(line.model, {})
        own = {token: text for token, text in line.alternative_texts.items() if vocabulary.setdefault(token, text) != text}
        entropies = [entry.entropy for entry in line.records if entry.entropy is not None]
        self.sequences.append(
            {
                "file": file,
                "title": sequence_title(line),
                "id": line.request_id,
                "index": line.index,
                # Below a title made of the answer the answer would stand twice.
                "snippet": answer_start(line, SNIPPET_CHARACTERS) if line.prompt else line.request_id,
                "model": line.model,
                "sampler": line.drawn_by,
                "preset": line.of_sampler("preset", str),
                "fidelity": line.of_sampler("fidelity", str),
                "created": line.created,
                "prompt": line.prompt_hash or None,
                "promptTokens": line.prompt_tokens,
                "tokens": len(line.token_ids),
                "records": len(line.records),
                "finish": line.finish_reason,
                "counts": [counts[kind] for kind in range(len(Regime) + 1)],
                "forced": sum(entry.forced for entry in line.records),
                "entropy": float(f"{fmean(entropies):.{DIGITS}g}") if entropies else None,
                "scores": _scores(line),
                **self._branch(file, line),
                "borders": self.borders.index(borders) if borders else None,
                "vocabulary": list(self._vocabularies).index(line.model),
            }
        )
        self.overview.add(file, line)
        self._interests.append(interest(line))
        self._packed.append(_packed(_columns(line, own)))

    def _branch(self, file: int, line: TraceLine) -> dict[str, Any]:
        """What the page is told of forks: which branch of which answer a sequence is, and all of an answer's branches.

        The lines of an answer follow one another in the order of its branches. Ids of requests come again, as with each run of
        an offline engine.
        """
        forks = None if line.forks is None else [branch.model_dump() for branch in line.forks]
        if line.branch is not None:
            branch, parted = line.branch.id, line.texts[line.branch.position : line.branch.position + 1]
        else:  # a saved response tells its branches, and has one of them alone
            branch, parted = next((one.id for one in line.forks or () if one.chosen), 0), []
        request = file, line.request_id, line.index
        if self._last is None or self._last[0] != request or branch <= self._last[1]:
            self._answers += 1
        self._last = request, branch
        text = "".join(parted) if branch else ""
        return {"answer": self._answers, "branch": branch, "parted": text, "lost": not line.is_answer, "forks": forks}

    def opening(self) -> int:
        """The sequence to open on: the one with most to see; of two files, one of the first that the second has beside it."""
        in_file: dict[int, list[int]] = {}
        for index, sequence in enumerate(self.sequences):
            if not sequence["lost"]:
                in_file.setdefault(sequence["file"], []).append(index)
        if not in_file:  # a part of a file, perhaps
            return 0
        first, *others = in_file.values()
        prompts = {self.sequences[index]["prompt"] for file in others for index in file} - {None}
        indices = [index for index in first if self.sequences[index]["prompt"] in prompts] or first
        return max(indices, key=lambda index: (self._interests[index], -index))

    def lay_out(self, opening: int) -> tuple[str, str, list[tuple[int, int]]]:
        """Tell each sequence where it is packed; called once, after all have been added.

        Returns:
            What is packed of the sequence to open on; all else that is packed, in one string; where the vocabularies are in it.
        """
        vocabularies = [_packed(_json(texts)) for texts in self._vocabularies.values()]
        begin, ranges = 0, []
        for index, packed in enumerate((*self._packed, *vocabularies)):
            end = begin if index == opening else begin + len(packed)  # the opening one lies apart
            ranges.append((begin, end))
            begin = end
        ranks = {value: rank for rank, value in enumerate(sorted(set(self._interests)))}
        for sequence, packed_at, value in zip(self.sequences, ranges, self._interests, strict=False):
            sequence |= {"packed": packed_at, "interest": ranks[value]}
        rest = "".join((*self._packed[:opening], *self._packed[opening + 1 :], *vocabularies))
        return self._packed[opening], rest, ranges[len(self._packed) :]


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()


def _columns(line: TraceLine, own_texts: dict[int, str]) -> bytes:
    """A sequence's tokens, column by column. report.js has the other half.

    JSON's length (4 bytes), JSON (the prompt, tokens' texts, texts of alternatives other than in the vocabulary), token ids; of
    each record its kind (its regime's number, ten more if forced; a byte), its number of alternatives (four bytes), metrics and
    parameters; of all alternatives their ids and probabilities.
    """
    records = line.records
    alternatives = [alternative for entry in records for alternative in entry.alternatives]
    text = _json({"prompt": line.prompt, "texts": line.texts, "alternativeTexts": own_texts})
    return b"".join(
        (
            len(text).to_bytes(4, "little"),
            text,
            _integers(line.token_ids, "<i8"),
            _integers([kind_of(entry) + 10 * entry.forced for entry in records], "<u1"),
            _integers([len(entry.alternatives) for entry in records], "<u4"),
            *(_numbers([getattr(entry, name) for entry in records]) for name in _shown()),
            _integers([token for token, _ in alternatives], "<i8"),
            _numbers([probability for _, probability in alternatives], PROBABILITY_DIGITS),
        )
    )


def _shown() -> list[str]:
    """Fields whose numbers the page gets, in order."""
    return [field.name for field in (*metrics(), *parameters())]


def _integers(values: Sequence[int], kind: str) -> bytes:
    """Integers of a little-endian kind; first bytes of all, then second ones, and so on: like compresses well beside like."""
    array = np.array(values, dtype=kind)
    return array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def _numbers(values: Sequence[float | None], digits: int = DIGITS) -> bytes:
    """Decimal numbers: integers of that many digits, and the powers of ten they are multiplied by, two bytes each.

    The power of what is missing or infinite is -32768.
    """
    mantissas, powers = [0] * len(values), [-32768] * len(values)
    for index, value in enumerate(values):
        if value is not None and math.isfinite(value):
            mantissa, power = f"{value:.{digits - 1}e}".split("e")
            mantissas[index], powers[index] = int(mantissa.replace(".", "")), int(power) - digits + 1
    return _integers(mantissas, "<i2") + _integers(powers, "<i2")


def _json(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _described(fields: Iterable[Field]) -> list[dict[str, str]]:
    return [{"field": field.name, "name": field.label, "unit": field.unit, "description": field.described} for field in fields]


def _scores(line: TraceLine) -> dict[str, float]:
    """The scores of the answer that aren't null."""
    told = line.answer_scores()
    known = ((score.name, getattr(told, score.name)) for score in SCORES)
    return {name: float(f"{value:.{DIGITS}g}") for name, value in known if value is not None}


def _regimes(without: bool) -> list[dict[str, str]]:
    """The kinds of tokens, by number."""
    known = [{"name": regime.name, "meaning": regime.meaning, "light": regime.light, "dark": regime.dark} for regime in Regime]
    return [*known, WITHOUT_REGIME] if without else known


def report(sources: Sequence[Source], title: str = "Traces") -> str:
    """The report of one or several sources as HTML.

    Raises:
        ConfigError: there is nothing to report, or jinja2 isn't installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ConfigError(f"a report needs jinja2 ({error}); install vllm-entropix[report]") from None
    payload = _Payload()
    for source in sources:
        payload.files.append(source.name)
        for line in source.lines:
            payload.add(len(payload.files) - 1, line)
    if not payload.sequences:
        raise ConfigError(f"no traces in {', '.join(payload.files)}")
    opening = payload.opening()
    first, rest, vocabularies = payload.lay_out(opening)
    data = {
        "files": payload.files,
        "leftOut": [source.left_out for source in sources],
        "sequences": payload.sequences,
        "borders": payload.borders,
        "vocabularies": vocabularies,
        "opening": opening,
        "first": first,
        "regimes": _regimes(payload.without_regime),
        "metrics": _described(metrics()),
        "parameters": _described(parameters()),
        "scores": [
            {"field": score.name, "name": score.label, "unit": score.unit, "description": score.described} for score in SCORES
        ],
        "histograms": payload.overview.histograms(),
        "uncertain": payload.overview.uncertain(),
    }
    page, style, script = map(template, TEMPLATES)
    plotly = plotly_script()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Markup is what is ours: style and scripts from this package and from plotly, and JSON that is escaped above.
    return environment.from_string(page).render(
        title=title,
        version=__version__,
        regimes=data["regimes"],
        script_hashes=" ".join((script_hash(plotly), script_hash(script))),
        style=Markup(style),
        # Base64 has nothing to escape.
        packed=Markup(rest),
        data=Markup(json_for_script(data)),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def write_report(path: str | Path, sources: Sequence[Source], title: str = "Traces") -> None:
    """Write the report of ``sources`` to ``path``; errors as :func:`report`, and ConfigError if it can't be written."""
    html = report(sources, title)
    try:
        Path(path).write_text(html, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't write the report to {path}: {error.strerror or error}") from None
