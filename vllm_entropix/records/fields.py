"""The table of what a record holds: one line per field, from which every format and every view is made.

The packed record, :class:`~.trace.TokenRecord`, the pydantic models and both JSON schemas, the export's columns, the report,
the terminal, the histograms on ``/metrics`` and the documentation's table follow it. A new metric is computed in one place and
gets a line here (or in its sampler's ``fields``); nothing else changes.

What all samplers share is COMMON. What one sampler adds, it registers; a token of another sampler has null there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

# Greatest finite float32.
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
# Version of what a choice of a response carries.
VERSION = 1
# Bytes of a number of the packed record, a little-endian float32.
NUMBER_BYTES = 4

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_ENTROPY = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
_VARENTROPY = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0)
# Names that an entry has beside its fields.
_TAKEN = frozenset({"token_id", "alternatives"})


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a record.

    In the packed record each is a float32, and NaN is null. JSON has no infinities, so they are null, too.

    Attributes:
        name: in every format.
        dtype: what its float32 stands for: a ``float``; an ``int``, never negative; a ``bool``, true above 0; or a
            ``category``, the index of its name in ``categories``.
        unit: such as bits; empty for a pure number.
        nullable: may it be null? All may but a bool, of which NaN is false unless it is nullable.
        label: short name for people.
        description: what it is, in one sentence without its unit.
        group: ``metric``: a measurement, shown as a mean and along a sequence; ``parameter``: what the token was drawn with;
            ``mark``: neither, as a regime.
        categories: names of a category's values.
        buckets: upper ends of the buckets of its histogram on ``/metrics``; the report draws its distribution, too. Empty:
            neither.
        required: is an entry without it none at all? True for what the first release wrote; of what came later, and of what one
            sampler adds, an entry without it tells nothing, which is null.
    """

    name: str
    dtype: Literal["float", "int", "bool", "category"]
    unit: str
    nullable: bool
    label: str
    description: str
    group: Literal["metric", "parameter", "mark"] = "metric"
    categories: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    required: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in _TAKEN:
            raise ValueError(f"a field of a record can't be named {self.name[:100]!r}: give it another name in lower case")
        if not self.nullable and self.dtype != "bool":
            raise ValueError(f"the field {self.name} has dtype {self.dtype}, which can be unmeasured: set nullable=True")
        if bool(self.categories) != (self.dtype == "category"):
            raise ValueError(f"the field {self.name} has dtype {self.dtype}: a category, and nothing else, has categories")

    @property
    def is_number(self) -> bool:
        """Is it a number that one can draw or average?"""
        return self.dtype in ("float", "int")

    @property
    def described(self) -> str:
        """The description with the unit."""
        return f"{self.description.removesuffix('.')}, {self.unit}." if self.unit else self.description

    @property
    def metric_name(self) -> str:
        """Name of its histogram on ``/metrics``."""
        return "_".join(filter(None, ("entropix", self.name, self.unit.replace("²", "2"))))


_metric = partial(Field, group="metric", required=True)
_parameter = partial(Field, group="parameter", required=True)

# name, dtype, unit, nullable, label, description
COMMON = (
    _metric("entropy", "float", "bits", True, "entropy", "Entropy of the next-token distribution.", buckets=_ENTROPY),
    _metric(
        "varentropy", "float", "bits²", True, "varentropy", "Varentropy of the next-token distribution.", buckets=_VARENTROPY
    ),
    _metric(
        "attention_entropy",
        "float",
        "bits",
        True,
        "attention entropy",
        "Attention entropy, mean over heads and observed layers.",
        buckets=_ENTROPY,
    ),
    _metric(
        "attention_varentropy", "float", "bits²", True, "attention varentropy", "Variance over heads of the attention entropy."
    ),
    _metric(
        "agreement", "float", "", True, "agreement", "Mean deviation of the heads from their mean; grows as they disagree."
    ),
    _metric("interaction_strength", "float", "", True, "interaction strength", "Mean absolute attention score."),
    Field("logprob", "float", "nats", True, "log-probability", "Log-probability of the token, before temperature and filters."),
    Field(
        "margin",
        "float",
        "",
        True,
        "margin",
        "Probability of the most probable token less that of the second, before temperature and filters.",
    ),
    _parameter("temperature", "float", "", True, "temperature", "Temperature of the draw; 0 is argmax."),
    _parameter("top_p", "float", "", True, "top_p", "Nucleus mass of the draw."),
    _parameter("top_k", "int", "", True, "top_k", "Number of candidates of the draw."),
    _parameter("min_p", "float", "", True, "min_p", "Smallest probability of the draw, relative to the largest."),
    Field("forced", "bool", "", False, "forced", "Forced as part of a clarification.", group="mark", required=True),
)
ALTERNATIVES = "Most probable tokens as (id, probability), before temperature and filters; null: no finite probability."

_by_owner: dict[str, tuple[Field, ...]] = {}
_table: tuple[Field, ...] = COMMON
# Each step asks for these.
_columns: dict[str, int] = {}
_names: tuple[str, ...] = ()
_followers: list[Callable[[], None]] = []


def register(owner: str, fields: Sequence[Field]) -> None:
    """Add a sampler's own fields to the table; what is made of the table has them from then on.

    Every process of a server must register the same fields: their order in the packed record is that of the owners' names,
    whatever the order of the calls. Registering an owner again replaces its fields; with no fields, it takes them out.

    Args:
        owner: the sampler's name.
        fields: as in its ``fields``.

    Raises:
        ValueError: a name is another's.
    """
    owners = {field.name: "all samplers" for field in COMMON}
    owners |= {field.name: name for name, theirs in _by_owner.items() if name != owner for field in theirs}
    for field in fields:
        if field.name in owners:
            raise ValueError(f"{owner} can't have a field {field.name}, which {owners[field.name]} has: give it another name")
        owners[field.name] = owner
    if _by_owner.get(owner, ()) == tuple(fields):
        return
    _by_owner[owner] = tuple(fields)
    global _table
    _table = (*COMMON, *(field for name in sorted(_by_owner) for field in _by_owner[name]))
    for follower in _followers:
        follower()


def follow(rebuild: Callable[[], None]) -> None:
    """Call ``rebuild`` now, and whenever the table has changed: for what is made of it once and not whenever it is used."""
    _followers.append(rebuild)
    rebuild()


def _number_columns() -> None:
    global _columns, _names
    _names = tuple(field.name for field in _table)
    _columns = {name: index for index, name in enumerate(_names)}


follow(_number_columns)


def all_fields() -> tuple[Field, ...]:
    """The table as it is now: the columns of the packed record, in order.

    In front of them stands a row's slot, 0 if there is nothing to tell of the row. Behind them stand, if a row of the step is
    traced, the strongest alternatives: ids, then probabilities before any filter.
    """
    return _table


def names() -> tuple[str, ...]:
    """Names of :func:`all_fields`."""
    return _names


def metrics() -> tuple[Field, ...]:
    """Fields that measure something, as numbers."""
    return tuple(field for field in _table if field.group == "metric" and field.is_number)


def parameters() -> tuple[Field, ...]:
    """Fields that tell what a token was drawn with, as numbers."""
    return tuple(field for field in _table if field.group == "parameter" and field.is_number)


def column(name: str) -> int | None:
    """A field's index in the packed record; None if no sampler has registered it."""
    return _columns.get(name)


def record_bytes() -> int:
    """Bytes of a packed record without alternatives."""
    return NUMBER_BYTES * len(_table)


def markdown_table() -> str:
    """The table for the documentation."""
    lines = ["| name | type | unit | null | what it is |", "|---|---|---|---|---|"]
    for field in _table:
        kind = "one of " + ", ".join(field.categories) if field.categories else field.dtype
        lines.append(f"| `{field.name}` | {kind} | {field.unit} | {'yes' if field.nullable else 'no'} | {field.description} |")
    return "\n".join(lines)
