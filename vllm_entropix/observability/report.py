"""Traces as one HTML file that opens without a network: text by regime, the entropy × varentropy plane, metrics, alternatives.

What came from a model is only ever data: compressed JSON in base64 per sequence, unpacked in the browser when the sequence is
looked at, and put on the page as text. A content security policy names the page's own scripts by their hashes, so that nothing
else runs and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_entropix._version import __version__
from vllm_entropix.config import ConfigError
from vllm_entropix.observability.schema import TokenEntry
from vllm_entropix.observability.terminal import MEANINGS
from vllm_entropix.observability.trace import REGIMES
from vllm_entropix.observability.tracefile import TraceLine

# The charts are plotly.js's smallest bundle: the one that Python's plotly brings takes a browser a second longer to start.
TEMPLATES = ("report.html.j2", "report.css", "report.js", "plotly/plotly-basic.min.js")
SNIPPET_CHARACTERS = 90
# Significant digits: of metrics and parameters, and of the probabilities of alternatives.
DIGITS = 4
PROBABILITY_DIGITS = 3
# The hues of terminal.STYLES, for light and for dark backgrounds.
COLOURS = {
    "LELV": ("#1f8a4c", "#4cc38a"),
    "HELV": ("#a626a4", "#e07be0"),
    "LEHV": ("#b08800", "#e3c341"),
    "HEHV": ("#cf2e2e", "#ff6b6b"),
    "ADAPTIVE": ("#0b86a8", "#4fc4e0"),
}
# Metric or parameter → its short name and unit; descriptions are the schema's.
METRICS = {
    "entropy": ("entropy", "bits"),
    "varentropy": ("varentropy", "bits²"),
    "attention_entropy": ("attention entropy", "bits"),
    "attention_varentropy": ("attention varentropy", "bits²"),
    "agreement": ("agreement", ""),
    "interaction_strength": ("interaction strength", ""),
    "confidence": ("confidence", ""),
}
PARAMETERS = {
    "temperature": ("temperature", ""),
    "top_p": ("top_p", ""),
    "top_k": ("top_k", ""),
    "min_p": ("min_p", ""),
}


@dataclass
class Source:
    """Traces that belong together, as those of a file.

    Attributes:
        name: shown in the report.
        lines: read once, one after the other.
    """

    name: str
    lines: Iterable[TraceLine]


@dataclass
class _Payload:
    """What the page's script gets: an index of all sequences, with the data of each packed."""

    files: list[str] = field(default_factory=list)
    sequences: list[dict[str, Any]] = field(default_factory=list)
    borders: list[dict[str, Any]] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    _packed_characters: int = 0

    def add(self, file: int, line: TraceLine) -> None:
        borders = line.thresholds.model_dump()
        if borders not in self.borders:
            self.borders.append(borders)
        counts: Counter[str] = Counter(entry.regime for entry in line.records)
        packed = _pack(_columns(line))
        begin = self._packed_characters
        self._packed_characters += len(packed)
        self.packed.append(packed)
        entropies = [entry.entropy for entry in line.records if entry.entropy is not None]
        self.sequences.append(
            {
                "file": file,
                "name": line.request_id,
                "index": line.index,
                "snippet": "".join(line.texts)[:SNIPPET_CHARACTERS],
                "model": line.model,
                "preset": line.preset,
                "fidelity": line.fidelity,
                "created": line.created,
                "prompt": line.prompt_hash,
                "promptTokens": line.prompt_tokens,
                "tokens": len(line.token_ids),
                "records": len(line.records),
                "finish": line.finish_reason,
                "counts": [counts[regime] for regime in REGIMES],
                "forced": sum(entry.forced for entry in line.records),
                "entropy": _short(fmean(entropies)) if entropies else None,
                "borders": self.borders.index(borders),
                "packed": (begin, self._packed_characters),
            }
        )


def _columns(line: TraceLine) -> dict[str, Any]:
    """A sequence's tokens column by column."""
    columns: dict[str, Any] = {
        "texts": line.texts,
        "ids": line.token_ids,
        "regimes": [REGIMES.index(entry.regime) for entry in line.records],
        "forced": [place for place, entry in enumerate(line.records) if entry.forced],
        "alternatives": [_flat(entry.alternatives) for entry in line.records],
        "alternativeTexts": line.alternative_texts,
    }
    for name in (*METRICS, *PARAMETERS):
        columns[name] = [_short(getattr(entry, name)) for entry in line.records]
    return columns


def _flat(alternatives: list[tuple[int, float]]) -> list[float | int | None]:
    """Ids and probabilities in turn."""
    return [part for token, p in alternatives for part in (token, _short(p, PROBABILITY_DIGITS))]


def _short(value: float | None, digits: int = DIGITS) -> float | int | None:
    if value is None:
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _pack(data: Any) -> str:
    return base64.b64encode(zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 6)).decode()


def _json_for_script(data: Any) -> str:
    """JSON that can stand in a ``script`` element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _described(fields: dict[str, tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"field": name, "name": shown, "unit": unit, "description": TokenEntry.model_fields[name].description or ""}
        for name, (shown, unit) in fields.items()
    ]


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
    data = {
        "files": payload.files,
        "sequences": payload.sequences,
        "borders": payload.borders,
        "regimes": [
            {"name": regime, "meaning": MEANINGS[regime], "light": COLOURS[regime][0], "dark": COLOURS[regime][1]}
            for regime in REGIMES
        ],
        "metrics": _described(METRICS),
        "parameters": _described(PARAMETERS),
    }
    templates = files("vllm_entropix.observability") / "templates"
    page, style, script, plotly = ((templates / name).read_text(encoding="utf-8") for name in TEMPLATES)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Markup is what is ours: style and scripts from this package and from plotly, and JSON that is escaped above.
    return environment.from_string(page).render(
        title=title,
        version=__version__,
        regimes=data["regimes"],
        script_hashes=" ".join((_script_hash(plotly), _script_hash(script))),
        style=Markup(style),
        # Base64 has nothing to escape.
        packed=Markup("".join(payload.packed)),
        data=Markup(_json_for_script(data)),
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
