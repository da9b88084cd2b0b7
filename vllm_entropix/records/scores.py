"""The table of an answer's scores: one line per score, from which every format and every view is made.

A score sums up the records of one answer. Models and JSON of responses, lines of trace files, tables, the report, the
histograms on ``/metrics``, what a request may abstain by, and the documentation's table follow it. A new score gets a line
here, and a ``statistic`` if it is of a new kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from vllm_entropix.records import fields
from vllm_entropix.records.regimes import Regime

if TYPE_CHECKING:
    import numpy as np

Statistic = Literal["mean", "max", "min", "first", "perplexity", "share"]

_BITS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Records that are gathered before they are folded into a few sums: what one answer holds in memory is bounded by them.
_FOLDED = 256


@dataclass(frozen=True, slots=True)
class Score:
    """A number that sums up an answer.

    Attributes:
        name: in every format.
        unit: such as bits; empty for a pure number.
        label: short name for people.
        description: what it is, in one sentence without its unit.
        of: name of the records' field that it sums up.
        statistic: how; a token whose field is null doesn't count.
        buckets: upper ends of the buckets of its histogram on ``/metrics``.
        category: the value whose share it is, for ``share``.
        doubtful: which value speaks against an answer, a ``high`` or a ``low`` one. Whether it does, evidence decides.
    """

    name: str
    unit: str
    label: str
    description: str
    of: str
    statistic: Statistic
    buckets: tuple[float, ...]
    category: str | None = None
    doubtful: Literal["high", "low"] = "high"

    @property
    def described(self) -> str:
        """The description with the unit."""
        return f"{self.description.removesuffix('.')}, {self.unit}." if self.unit else self.description

    @property
    def metric_name(self) -> str:
        """Name of its histogram on ``/metrics``."""
        return "_".join(filter(None, ("entropix_answer", self.name, self.unit.replace("²", "2"))))


def _share(regime: Regime) -> Score:
    name = f"share_{regime.name.lower()}"
    about = f"Share of the tokens in {regime.name}, of those that have a regime."
    # Where the model is sure, a larger share speaks for the answer.
    doubtful: Literal["high", "low"] = "low" if regime is Regime.LELV else "high"
    return Score(name, "", f"share of {regime.name}", about, "regime", "share", _SHARES, regime.name, doubtful)


# name, unit, label, description, of, statistic, buckets
SCORES = (
    Score("entropy_mean", "bits", "mean entropy", "Mean entropy of the answer's tokens.", "entropy", "mean", _BITS),
    Score("entropy_max", "bits", "maximum entropy", "Greatest entropy of a token.", "entropy", "max", _BITS),
    Score("entropy_first", "bits", "first entropy", "Entropy of the first token.", "entropy", "first", _BITS),
    Score(
        "varentropy_mean",
        "bits²",
        "mean varentropy",
        "Mean varentropy of the answer's tokens.",
        "varentropy",
        "mean",
        (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0),
    ),
    Score(
        "perplexity",
        "",
        "perplexity",
        "Exponential of the tokens' mean negative log-probability, before temperature and filters.",
        "logprob",
        "perplexity",
        (1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0),
    ),
    Score(
        "margin_min",
        "",
        "least margin",
        "Least difference between the probabilities of the two most probable tokens.",
        "margin",
        "min",
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99),
        doubtful="low",
    ),
    Score(
        "attention_entropy_mean",
        "bits",
        "mean attention entropy",
        "Mean attention entropy of the tokens that it was measured for.",
        "attention_entropy",
        "mean",
        _BITS,
    ),
    *map(_share, Regime),
)
BY_NAME = {score.name: score for score in SCORES}
# What plain log-probabilities tell, which the other scores have to beat.
CONTROL = "perplexity"


class AnswerScores(BaseModel):
    """The scores of one answer. What no token tells, or isn't finite, is null."""

    # Between these stand the scores of the table, put there below.

    model_config = ConfigDict(extra="ignore", json_schema_serialization_defaults_required=True)

    tokens: Annotated[int, Field(ge=0, le=2**53 - 1, description="Tokens that the scores sum up: all but the forced ones.")] = 0
    abstained: bool | None = Field(
        None, description="Is the answer beyond the request's entropix_abstain_above or _below? null: it names none."
    )

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A score of the table."""


def _with_table() -> type[AnswerScores]:
    number: Any = Annotated[float, Field(ge=-fields.MAX_FLOAT32, le=fields.MAX_FLOAT32)] | None
    scores: dict[str, Any] = {score.name: (number, Field(None, description=score.described)) for score in SCORES}
    made = create_model("AnswerScores", __base__=AnswerScores, __module__=__name__, **scores)
    made.__doc__ = AnswerScores.__doc__
    return made


if not TYPE_CHECKING:
    AnswerScores = _with_table()


@dataclass(frozen=True, slots=True)
class Abstention:
    """When an answer is to be marked as one that had better not be given.

    Attributes:
        score: name of a score.
        above: the answer abstains if its score is greater; None: no bound.
        below: the same if it is less.
    """

    score: str
    above: float | None = None
    below: float | None = None

    def applies(self, scores: Mapping[str, Any]) -> bool:
        """Whether an answer with these scores abstains; one whose score is null doesn't."""
        value = scores[self.score]
        if value is None:
            return False
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)


@dataclass(slots=True)
class _Sums:
    """What is known so far of one score: a number of tokens, and a sum, an extreme or the first value."""

    count: int = 0
    value: float = math.nan


@dataclass(slots=True)
class Tally:
    """Gathers an answer's records as they come, in bounded memory, and gives its scores.

    Attributes:
        tokens: taken in, without those that were forced: they aren't the model's answer, and count in no score.
    """

    tokens: int = 0
    _sums: dict[str, _Sums] = field(default_factory=lambda: {score.name: _Sums() for score in SCORES})
    _waiting: bytearray = field(default_factory=bytearray)
    _width: int = 0

    def add(self, records: bytes, width: int) -> None:
        """Take in packed records, each ``width`` bytes: the table's fields, and alternatives behind them perhaps."""
        if width != self._width:
            self._fold()
            self._width = width
        self._waiting += records
        if len(self._waiting) >= _FOLDED * width:
            self._fold()

    def add_values(self, values: np.ndarray) -> None:
        """Take in records as float32 ``[tokens, fields or more]``, in the order of the table of fields."""
        import numpy as np

        columns = {name: values[:, index] for index, name in enumerate(fields.names())}
        drawn = ~(columns["forced"] > 0)
        first = self.tokens == 0
        self.tokens += int(drawn.sum())
        if not drawn.any():
            return
        for score in SCORES:
            column = columns.get(score.of)
            if column is None:
                continue
            of_answer = column[drawn].astype(np.float64)
            if score.statistic == "share":
                # As encoding.py reads a category: what is none of them is null.
                categories = next(one.categories for one in fields.all_fields() if one.name == score.of)
                known = of_answer[(of_answer >= 0) & (of_answer < len(categories))]
                of_answer = np.floor(known) == categories.index(str(score.category))
            sums = self._sums[score.name]
            if score.statistic == "first":
                if first:
                    sums.count, sums.value = 1, float(of_answer[0])
                continue
            known = of_answer[np.isfinite(of_answer)]
            if len(known):
                _take_in(sums, score, known)

    def _fold(self) -> None:
        import numpy as np

        if self._waiting:
            values = np.frombuffer(bytes(self._waiting), dtype="<f4").reshape(-1, self._width // fields.NUMBER_BYTES)
            self._waiting = bytearray()
            self.add_values(values)

    def values(self, abstention: Abstention | None = None) -> dict[str, Any]:
        """What :class:`AnswerScores` describes, as JSON values.

        Args:
            abstention: what the request says of abstaining.
        """
        self._fold()
        scores: dict[str, Any] = {score.name: _finite(_of_sums(self._sums[score.name], score)) for score in SCORES}
        abstained = None if abstention is None else abstention.applies(scores)
        return {"tokens": self.tokens, "abstained": abstained, **scores}


def _take_in(sums: _Sums, score: Score, known: np.ndarray) -> None:
    """Add a part's finite values to what is known of a score."""
    before = sums.value if sums.count else None
    if score.statistic == "max":
        found = float(known.max())
        sums.value = found if before is None else max(before, found)
    elif score.statistic == "min":
        found = float(known.min())
        sums.value = found if before is None else min(before, found)
    else:
        sums.value = (before or 0.0) + float(known.sum())
    sums.count += len(known)


def _of_sums(sums: _Sums, score: Score) -> float:
    if not sums.count:
        return math.nan
    if score.statistic in ("max", "min", "first"):
        return sums.value
    mean = sums.value / sums.count
    if score.statistic != "perplexity":
        return mean
    return math.exp(-mean) if -mean < math.log(fields.MAX_FLOAT32) else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) and abs(value) <= fields.MAX_FLOAT32 else None


def scores_of_entries(entries: Iterable[Any]) -> AnswerScores:
    """The scores of an answer whose records are at hand as objects: TokenRecords or TokenEntries."""
    import numpy as np

    table = fields.all_fields()
    rows = [[_packed(getattr(entry, one.name, None), one) for one in table] for entry in entries]
    tally = Tally()
    tally.add_values(np.array(rows, dtype=np.float32).reshape(len(rows), len(table)))
    return AnswerScores.model_validate(tally.values())


def _packed(value: Any, kind: fields.Field) -> float:
    """A field's value as a packed record has it."""
    if value is None:
        return math.nan
    return float(kind.categories.index(value)) if kind.categories else float(value)


def scores(output: Any) -> list[AnswerScores | None]:
    """The scores of each finished completion of a vLLM RequestOutput, None where none were asked for."""
    return [getattr(completion, "entropix_scores", None) for completion in output.outputs]


def check_name(name: Any) -> str:
    """``name``, if it is a score's; ValueError that says where they are listed."""
    if not isinstance(name, str) or name not in BY_NAME:
        raise ValueError("it should be a score, such as entropy_mean; `vllm-entropix scores --markdown` lists them")
    return name


def markdown_table(table: Sequence[Score] = SCORES) -> str:
    """The table for the documentation."""
    lines = ["| score | unit | speaks against an answer | what it is |", "|---|---|---|---|"]
    for score in table:
        lines.append(f"| `{score.name}` | {score.unit} | if {score.doubtful} | {score.description} |")
    return "\n".join(lines)
