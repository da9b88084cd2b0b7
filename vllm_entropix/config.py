"""Server-wide settings of the entropix sampler.

Every constant of the original sampler is a named setting here, with a unit, a range and one line of description. The values
themselves live in ``presets/*.toml``: a configuration is a preset with some settings changed.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

DEFAULT_PRESET = "jax-2024-10"
MAX_CLARIFICATION_TOKENS = 64

Fidelity = Literal["corrected", "original"]
ClarificationRule = Literal["cooldown", "last-token", "ever"]
BaseSource = Literal["preset", "request"]
AttentionVarentropy = Literal["heads", "heads-unbiased", "zero"]


class ConfigError(ValueError):
    """A configuration that can't be used; the message is one sentence that names the setting and what is allowed."""


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


# Characters of a value that an error repeats.
QUOTED = 100
_SHORT = _ShortRepr()


def quoted(value: Any) -> str:
    """``repr(value)`` for an error message, cut to 100 characters: what is refused may be megabytes long."""
    return cut(_SHORT.repr(value))


def cut(text: str, length: int = QUOTED) -> str:
    """``text`` if it has at most ``length`` characters, otherwise its beginning and an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def refuse_truth_value(value: Any) -> Any:
    """``value``, unless it is true or false, which Python takes for the numbers 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("it should be a number")
    return value


def _setting(description: str, unit: str = "", **bounds: Any) -> Any:
    """A field with a unit; ``bounds`` are pydantic's ge, gt, le, lt (which NaN never satisfies)."""
    return Field(description=description, json_schema_extra={"unit": unit}, **bounds)


class Section(BaseModel):
    """A group of settings: immutable, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_truth_value(value) if cls.model_fields[str(info.field_name)].annotation in (int, float) else value


class BaseParameters(Section):
    """Parameters before a regime changes them (SEMANTICS: T0, P0, K0)."""

    temperature: float = _setting("Base temperature T0.", gt=0, le=10)
    top_p: float = _setting("Base nucleus mass P0.", "probability", gt=0, le=1)
    top_k: int = _setting("Base number of candidates K0; regimes scale it.", "tokens", ge=1, le=100_000)
    min_p: float = _setting("Base smallest probability, relative to the largest.", "ratio", ge=0, le=1)


class Base(BaseParameters):
    """The server's base parameters, and whether a request's own come before them."""

    source: BaseSource = Field(
        "preset",
        description="Where base parameters come from if a request doesn't say `entropix_base`: from these settings (`preset`), "
        "or from the temperature, top_p, top_k and min_p of the `request`.",
        json_schema_extra={"unit": ""},
    )


class LelvThresholds(Section):
    """Low entropy, low varentropy: sure."""

    entropy_below: float = _setting("LELV needs a logits entropy below this.", "bits", ge=0, le=64)
    varentropy_below: float = _setting("LELV needs a logits varentropy below this.", "bits²", ge=0, le=4096)


class HelvThresholds(Section):
    """High entropy, low varentropy: evenly lost."""

    entropy_above: float = _setting("HELV needs a logits entropy above this.", "bits", ge=0, le=64)
    varentropy_below: float = _setting("HELV needs a logits varentropy below this.", "bits²", ge=0, le=4096)


class LehvThresholds(Section):
    """Low entropy, high varentropy: a fork."""

    entropy_below: float = _setting("LEHV needs a logits entropy below this.", "bits", ge=0, le=64)
    varentropy_above: float = _setting("LEHV needs a logits varentropy above this.", "bits²", ge=0, le=4096)


class HehvThresholds(Section):
    """High entropy, high varentropy: the mist."""

    entropy_above: float = _setting("HEHV needs a logits entropy above this.", "bits", ge=0, le=64)
    varentropy_above: float = _setting("HEHV needs a logits varentropy above this.", "bits²", ge=0, le=4096)


class Thresholds(Section):
    """Borders of the regimes in the entropy × varentropy plane.

    Inequalities are strict, and the first match of LELV, HELV, LEHV, HEHV wins.
    """

    lelv: LelvThresholds
    helv: HelvThresholds
    lehv: LehvThresholds
    hehv: HehvThresholds


class HelvParameters(Section):
    """HELV, when the clarification isn't inserted: temperature = min(max, T0·(offset + coefficient·attention entropy))."""

    temperature_offset: float = _setting("Factor on T0 at attention entropy 0.", ge=0, le=10)
    temperature_attention_entropy: float = _setting("Factor on T0 per bit of attention entropy.", "1/bit", ge=-10, le=10)
    temperature_max: float = _setting("Cap of the temperature.", gt=0, le=100)


class LehvParameters(Section):
    """LEHV: temperature = min(max, T0·(offset + coefficient·interaction)).

    top_k = max(min, trunc(K0·(1 + disagreement·(1 - agreement)))).
    """

    temperature_offset: float = _setting("Factor on T0 at interaction strength 0.", ge=0, le=10)
    temperature_interaction: float = _setting("Factor on T0 per unit of interaction strength.", ge=-10, le=10)
    temperature_max: float = _setting("Cap of the temperature.", gt=0, le=100)
    top_k_disagreement: float = _setting("Widening of K0 at agreement 0.", ge=0, le=10)
    top_k_min: int = _setting("Floor of top_k.", "tokens", ge=1, le=100_000)


class HehvParameters(Section):
    """HEHV: temperature = max(min, T0·(offset + coefficient·attention varentropy)).

    top_p = max(min, P0 - coefficient·attention entropy).
    """

    temperature_offset: float = _setting("Factor on T0 at attention varentropy 0.", ge=0, le=10)
    temperature_attention_varentropy: float = _setting(
        "Factor on T0 per bit² of attention varentropy.", "1/bit²", ge=-10, le=10
    )
    temperature_min: float = _setting("Floor of the temperature.", gt=0, le=100)
    top_p_attention_entropy: float = _setting("Drop of P0 per bit of attention entropy.", "1/bit", ge=-1, le=1)
    top_p_min: float = _setting("Floor of top_p.", "probability", gt=0, le=1)


class AdaptiveParameters(Section):
    """ADAPTIVE: every parameter follows the metrics, and the best of ``samples`` draws is kept (in closed form)."""

    samples: int = _setting("Draws, of which the most probable is kept.", "draws", ge=1, le=64)
    temperature_logits: float = _setting("Factor on T0 per bit of logits entropy and bit² of varentropy.", ge=-10, le=10)
    temperature_attention: float = _setting("Factor on T0 per bit of attention entropy and bit² of varentropy.", ge=-10, le=10)
    temperature_agreement: float = _setting("Drop of T0's factor per unit of agreement.", ge=-10, le=10)
    temperature_max: float = _setting("Cap of the temperature; the original has none (D14).", gt=0, le=100)
    top_p_attention_varentropy: float = _setting("Rise of P0's factor per bit² of attention varentropy.", ge=-10, le=10)
    top_p_min: float = _setting("Floor of top_p.", "probability", gt=0, le=1)
    top_p_max: float = _setting("Cap of top_p.", "probability", gt=0, le=1)
    top_k_interaction: float = _setting("Rise of K0's factor per unit of interaction strength.", ge=-10, le=10)
    top_k_agreement: float = _setting("Drop of K0's factor per unit of agreement.", ge=-10, le=10)
    top_k_min: int = _setting("Floor of top_k.", "tokens", ge=1, le=100_000)
    top_k_max: int = _setting("Cap of top_k.", "tokens", ge=1, le=100_000)
    min_p: float = _setting("Base of ADAPTIVE's min_p.", "ratio", ge=0, le=1)
    min_p_logits: float = _setting("Drop of min_p's factor per bit of logits entropy and bit² of varentropy.", ge=-10, le=10)
    min_p_min: float = _setting("Floor of min_p.", "ratio", ge=0, le=1)
    min_p_max: float = _setting("Cap of min_p.", "ratio", ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("top_p", "top_k", "min_p"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ValueError(f"{name}_min, which is {low}, is above {name}_max, which is {high}")
        return self


class ConfidenceWeights(Section):
    """Weights of the confidence score C that is reported with each token (SEMANTICS 3)."""

    logits_entropy: float = _setting("Weight of 1 - logits entropy.", "1/bit", ge=-100, le=100)
    attention_entropy: float = _setting("Weight of 1 - attention entropy.", "1/bit", ge=-100, le=100)
    logits_varentropy: float = _setting("Weight of 1 - logits varentropy.", "1/bit²", ge=-100, le=100)
    attention_varentropy: float = _setting("Weight of 1 - attention varentropy.", "1/bit²", ge=-100, le=100)
    agreement: float = _setting("Weight of agreement.", ge=-100, le=100)
    interaction: float = _setting("Weight of interaction strength.", ge=-100, le=100)


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class OriginalBehaviour(Section):
    """What ``fidelity = "original"`` reproduces of the original's defects (SEMANTICS 5); without effect otherwise."""

    attention_varentropy: AttentionVarentropy = _setting(
        "D3: variance over heads, with Bessel's correction, or 0 as over an axis of size 1."
    )
    padded_positions: int = _setting(
        "D2: key slots that are always counted, empty ones with score 0.", "positions", ge=1, le=1_048_576
    )
    clarification_rule: ClarificationRule = _setting("D10: how a repeated clarification is prevented.")
    clarification_token_ids: tuple[TokenId, ...] = _setting("D11: the clarification of the Llama-3 vocabulary.", "token ids")


class Clarification(Section):
    """Tokens that HELV forces into the text: none unless ``text`` or ``token_ids`` is given."""

    text: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="Text to force, encoded with the served tokenizer.",
        json_schema_extra={"unit": "text"},
    )
    token_ids: tuple[TokenId, ...] | None = Field(
        None,
        min_length=1,
        max_length=MAX_CLARIFICATION_TOKENS,
        description="Token ids to force, instead of a text.",
        json_schema_extra={"unit": "token ids"},
    )
    rule: ClarificationRule | None = Field(
        None,
        description="When to insert again: after `cooldown` tokens, unless it is the `last-token`, or unless it occurred "
        "`ever`; unset: cooldown (corrected) or the preset's own (original).",
        json_schema_extra={"unit": ""},
    )
    cooldown: int = Field(
        16,
        ge=0,
        le=1_000_000,
        description="Tokens that must follow an insertion before the next.",
        json_schema_extra={"unit": "tokens"},
    )
    max_per_request: int = Field(
        4, ge=0, le=1_000_000, description="Insertions per request at most.", json_schema_extra={"unit": "insertions"}
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.text is not None and self.token_ids is not None:
            raise ValueError("give text or token_ids, not both")
        return self


class Attention(Section):
    """Which attention is observed."""

    enabled: bool = Field(True, description="Off: the sampler runs on the logits alone.", json_schema_extra={"unit": ""})
    layers: Literal["last", "all"] | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        "last",
        description="`last`, `all`, or a list of layer indices; statistics are the mean over them.",
        json_schema_extra={"unit": "layers"},
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _known_layers(cls, value: Any) -> Any:
        if value in ("last", "all"):
            return value
        if isinstance(value, (list, tuple)):
            # `--sampler-config.attention.layers+ 1` gives text; no layer has a number of ten digits.
            value = [int(layer) if isinstance(layer, str) and re.fullmatch("[0-9]{1,9}", layer) else layer for layer in value]
        if not isinstance(value, (list, tuple)) or not all(type(layer) is int and 0 <= layer < 10**9 for layer in value):
            raise ValueError("it should be 'last', 'all' or a list of layer indices")
        if not value:
            raise ValueError("no layer is named; set attention.enabled = false to run on logits alone")
        if len(set(value)) != len(value):
            raise ValueError("a layer is named twice")
        return value


class Trace(Section):
    """Per-token trace records."""

    default: bool = Field(False, description="Trace every request that doesn't say otherwise.", json_schema_extra={"unit": ""})
    alternatives: int = Field(
        5,
        ge=0,
        le=20,
        description="Most probable tokens that are recorded with each token.",
        json_schema_extra={"unit": "tokens"},
    )
    max_tokens: int = Field(
        8192,
        ge=1,
        le=10_000_000,
        description="Records kept per sequence; later tokens are counted but not kept.",
        json_schema_extra={"unit": "tokens"},
    )
    # 64 answers of 1024 tokens: some 36 MB of JSON, with five alternatives per token.
    response_tokens: int = Field(
        65_536,
        ge=1,
        le=10_000_000,
        description="Records in one HTTP response, all choices together; tokens beyond have none there.",
        json_schema_extra={"unit": "tokens"},
    )
    path: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="File that traced sequences are written to as JSON lines; its folder must exist. Unset: none is written.",
        json_schema_extra={"unit": "path"},
    )
    max_megabytes: int = Field(
        100,
        ge=1,
        le=1_000_000,
        description="Size at which the file of traces is set aside and another begun; longer lines are dropped.",
        json_schema_extra={"unit": "MB"},
    )
    files: int = Field(
        5,
        ge=1,
        le=10_000,
        description="Files of traces that each process keeps, the one being written included.",
        json_schema_extra={"unit": "files"},
    )

    queue_megabytes: int = Field(
        64,
        ge=1,
        le=1_000_000,
        description="Finished sequences that wait to be written, in memory and per process; more are dropped and counted.",
        json_schema_extra={"unit": "MB"},
    )
    prompts: bool = Field(
        False,
        description="Write the text of prompts into traces on disk, and not only its hash.",
        json_schema_extra={"unit": ""},
    )

    @field_validator("path")
    @classmethod
    def _a_file(cls, value: str | None) -> str | None:
        if value is not None and ("\0" in value or value.endswith("/")):
            raise ValueError("it should be the path of a file")
        return value


class EntropixConfig(Section):
    """All settings of a server: a preset with some settings changed.

    Settings that are not given come from the preset, so ``EntropixConfig()`` is the default preset, corrected.
    """

    preset_name: str = Field(
        DEFAULT_PRESET, alias="preset", description="Preset that all other settings start from.", json_schema_extra={"unit": ""}
    )
    fidelity: Fidelity = Field(
        "corrected",
        description="`corrected`, or `original` to reproduce the original's published behaviour row by row.",
        json_schema_extra={"unit": ""},
    )
    regimes: bool = Field(
        True,
        description="Off: every token is drawn with the base parameters; metrics and regimes are still reported.",
        json_schema_extra={"unit": ""},
    )
    prometheus: bool = Field(
        True, description="Count tokens, regimes and entropies for vLLM's /metrics.", json_schema_extra={"unit": ""}
    )
    base: Base
    thresholds: Thresholds
    helv: HelvParameters
    lehv: LehvParameters
    hehv: HehvParameters
    adaptive: AdaptiveParameters
    confidence: ConfidenceWeights
    original: OriginalBehaviour
    clarification: Clarification = Field(default_factory=lambda: Clarification())
    attention: Attention = Field(default_factory=lambda: Attention())
    trace: Trace = Field(default_factory=lambda: Trace())

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return merge(read_preset(data.get("preset", DEFAULT_PRESET)), data)

    @classmethod
    def preset_names(cls) -> tuple[str, ...]:
        """Names of the shipped presets, sorted."""
        return _preset_names()

    @classmethod
    def preset(cls, name: str = DEFAULT_PRESET, **settings: Any) -> Self:
        """The preset ``name`` with top-level ``settings`` changed; ConfigError if one is unknown or out of range."""
        return cls.from_dict({**settings, "preset": name})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "sampler config") -> Self:
        """Settings from a nested mapping; ConfigError with one line for the first thing wrong, prefixed with ``source``."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError(f"{source}: {describe(error, cls)}") from None
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Settings from a ``.json``, ``.toml`` or ``.yaml`` file; ConfigError if it can't be read or parsed."""
        return cls.from_dict(read_mapping(Path(path)), source=str(path))

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | EntropixConfig | None) -> EntropixConfig:
        """Settings from whatever a user gives: nothing, a mapping, JSON text, a preset's name, or a JSON, TOML or YAML file."""
        if isinstance(source, EntropixConfig):
            return source
        return cls.from_dict(as_mapping(source))

    def numbers(self) -> Iterator[tuple[str, float]]:
        """The numeric constants that a step reads, as (dotted name, value), in a fixed order.

        With ``fidelity = "original"`` ADAPTIVE's temperature has no cap (D14).
        """
        for section in ("base", "thresholds", "helv", "lehv", "hehv", "adaptive", "confidence"):
            for name, value in _flatten(section, getattr(self, section)):
                if self.fidelity == "original" and name == "adaptive.temperature_max":
                    value = math.inf
                yield name, value

    @property
    def attention_varentropy(self) -> AttentionVarentropy:
        """How the variance over heads is taken (D3)."""
        return self.original.attention_varentropy if self.fidelity == "original" else "heads"

    @property
    def padded_positions(self) -> int | None:
        """Number of key slots that count whatever the context's length (D2), or None: only the real positions count."""
        return self.original.padded_positions if self.fidelity == "original" else None

    @property
    def clarification_rule(self) -> ClarificationRule:
        """The rule against repeated clarifications in force (D10)."""
        if self.clarification.rule is not None:
            return self.clarification.rule
        return self.original.clarification_rule if self.fidelity == "original" else "cooldown"


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables as one; where both have a value ``over`` wins, and tables in them are merged the same way."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _flatten(prefix: str, section: BaseModel) -> Iterator[tuple[str, float]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _flatten(f"{prefix}.{name}", value)
        elif isinstance(value, (int, float)):
            yield f"{prefix}.{name}", float(value)


@cache
def _preset_names() -> tuple[str, ...]:
    folder = files("vllm_entropix") / "presets"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


@cache
def _preset_text(name: str) -> str:
    return (files("vllm_entropix") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def read_preset(name: Any) -> dict[str, Any]:
    """The settings of a shipped preset; ConfigError that lists the presets if there is none of this name."""
    if not isinstance(name, str) or name not in _preset_names():
        raise ConfigError(f"unknown preset {quoted(name)}; there are {', '.join(_preset_names())}")
    return tomllib.loads(_preset_text(name))


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None  # PyYAML's messages have several lines
    return {} if data is None else data  # an empty file


_READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    "": tomllib.loads,
}
SUFFIXES = ".json, .toml, .yaml or .yml"


def read_mapping(path: Path) -> dict[str, Any]:
    """The table of a JSON, TOML or YAML file; ConfigError that names the file if it is missing, broken or of another type."""
    name, suffix = cut(str(path), 200), path.suffix.lower()
    if suffix not in _READERS:
        raise ConfigError(f"the sampler config {name} is a file of another kind; its name should end in {SUFFIXES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"can't read the sampler config {name}: not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"can't read the sampler config {name}: {reason}") from None
    kind = suffix.lstrip(".").replace("yml", "yaml").upper() or "TOML"
    data = _parse(text, _READERS[suffix], f"the sampler config {name} is not valid {kind}")
    if not isinstance(data, dict):
        raise ConfigError(f"the sampler config {name} holds a {type(data).__name__}, not a table of settings")
    return data


def _parse(text: str, read: Callable[[str], Any], problem: str) -> Any:
    try:
        return read(text)
    except (ValueError, RecursionError) as error:  # the decoders' errors are ValueErrors, and so is a number of 5000 digits
        raise ConfigError(f"{problem}: {cut(str(error), 300)}") from None


def as_mapping(source: str | Path | Mapping[str, Any] | EntropixConfig | None) -> dict[str, Any]:
    """A settings table from nothing, a mapping, JSON text, a preset's name, or the path of a JSON, TOML or YAML file."""
    if source is None:
        return {}
    if isinstance(source, EntropixConfig):
        return source.model_dump(mode="json", by_alias=True)
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, Path):
        return read_mapping(source)
    if not isinstance(source, str):
        raise ConfigError(f"a sampler config is a table, JSON text, a preset's name or a file, not {type(source).__name__}")
    text = source.strip()
    if text.startswith("{"):
        data = _parse(text, json.loads, "the sampler config is not valid JSON")
        assert isinstance(data, dict)  # it starts with a brace
        return data
    if text in _preset_names():
        return {"preset": text}
    if "/" in text or Path(text).suffix.lower() in _READERS.keys() - {""} or os.path.isfile(text):
        return read_mapping(Path(text))
    raise ConfigError(
        f"unknown preset {quoted(text)}; there are {', '.join(_preset_names())}, "
        f"or give JSON or a file whose name ends in {SUFFIXES}"
    )


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error in one sentence: the setting, its value, and what is allowed."""
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        fields = _section_at(model, first["loc"][:-1]).model_fields
        allowed = ", ".join(field.alias or field_name for field_name, field in fields.items())
        return f"unknown setting {quoted(name)}; here are {allowed}"
    # Parts with a bracket are pydantic's names of a union's members.
    name = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or "[" not in part)
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "missing":
        return f"{cut(name)} is missing"
    if not name:
        return message
    return f"{cut(name)} is {quoted(first['input'])}, but {message}"


def _section_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    return model
