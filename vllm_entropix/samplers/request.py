"""Per-request settings: their names, what they may be, and how they lie over the server's configuration.

Offline they are ``SamplingParams(extra_args={...})``, over HTTP ``vllm_xargs``, whose values are strings, numbers or lists.
Hence flat names and tolerant booleans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_entropix.records.scores import Abstention, check_name
from vllm_entropix.samplers.entropix.presets import preset_names_of_requests
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import QUOTED, ConfigError, quoted
from vllm_entropix.settings.load import parse
from vllm_entropix.settings.rules import BaseSource, Fidelity
from vllm_entropix.settings.section import describe, refuse_truth_value
from vllm_entropix.settings.server import BaseParameters, Forks

if TYPE_CHECKING:
    from vllm_entropix.samplers.chain import ChainRequest

PREFIX = "entropix"
# Stands between a sampler's name and its setting's in the name of a field, where no sampler's name has it.
OF_SAMPLER = "__"
# What no other sampler reads, though it stands in no section of the sampler's.
_OF_ENTROPIX = ("preset", "base", "own_constants", *BaseParameters.model_fields)
# vLLM's own border: a temperature below is 0.
GREEDY_BELOW = 1e-5

_ON = frozenset({"on", "true", "yes", "1", "1.0"})
_OFF = frozenset({"off", "false", "no", "0", "0.0"})


def _switch(value: Any) -> bool:
    if isinstance(value, str):
        value = value.strip().lower()
        if value in _ON or value in _OFF:
            return value in _ON
    elif isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise ValueError("it should be on or off")


def _joined(value: Any) -> Any:
    """A chain as one text: llama.cpp's clients send a list of names."""
    return ";".join(value) if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value) else value


def _known_preset(value: Any) -> Any:
    names = preset_names_of_requests()
    if value in EntropixConfig.preset_names() and value not in names:
        raise ValueError(f"what switches regimes off does so for a whole server; there are {', '.join(names)}")
    if value not in names:
        raise ValueError(f"there are {', '.join(names)}")
    return value


def _constants(value: Any) -> Any:
    if isinstance(value, str):
        value = parse(value, json.loads, "it should be a JSON object of constants, but isn't JSON")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError('it should be a JSON object of constants, as in {"base.temperature": 0.7}')
    return EntropixConfig.checked_constants(value)


def _base(name: str) -> Any:
    """A field of the same range as the server's base parameter of this name."""
    source = BaseParameters.model_fields[name]
    field: Any = Field(None, alias=f"{PREFIX}_{name}", description=f"This request's {source.description}")
    field.metadata.extend(source.metadata)
    return field


def _fork(name: str, alias: str | None = None) -> Any:
    """A field of the same range as the server's setting of forks of this name."""
    source = Forks.model_fields[name]
    field: Any = Field(None, alias=alias or f"{PREFIX}_fork_{name}", description=f"This request's forks: {source.description}")
    field.metadata.extend(source.metadata)
    return field


Switch = Annotated[bool, BeforeValidator(_switch)]


class RequestSettings(BaseModel):
    """What one request may say about entropix. Everything is optional; names as users write them are the aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampler: Annotated[str, BeforeValidator(_joined)] | None = Field(
        None, alias="samplers", description="Sampler of this request, or chain of samplers, instead of the server's."
    )
    enabled: Switch = Field(True, alias=PREFIX, description="on or off; off samples as vLLM does without the plugin.")
    preset: Annotated[str, BeforeValidator(_known_preset)] | None = Field(
        None, alias=f"{PREFIX}_preset", description="Preset whose constants this request uses instead of the server's."
    )
    base: BaseSource | None = Field(
        None,
        alias=f"{PREFIX}_base",
        description="Take base temperature, top_p, top_k and min_p from the preset, or from the request's own parameters; "
        "unset: as the server's base.source says.",
    )
    temperature: float | None = _base("temperature")
    top_p: float | None = _base("top_p")
    top_k: int | None = _base("top_k")
    min_p: float | None = _base("min_p")
    own_constants: Annotated[dict[str, float] | None, BeforeValidator(_constants)] = Field(
        None,
        alias=f"{PREFIX}_constants",
        description="Constants of this request's own, as a JSON object by dotted name; only if experiments.constants is on.",
    )
    clarification: Switch | None = Field(
        None, alias=f"{PREFIX}_clarification", description="on or off: may clarification tokens be forced into this request?"
    )
    trace: Switch | None = Field(None, alias=f"{PREFIX}_trace", description="on or off: return a record per generated token.")
    scores: Switch | None = Field(None, alias=f"{PREFIX}_scores", description="on or off: return scores of the whole answer.")
    abstain_score: Annotated[str, BeforeValidator(check_name)] | None = Field(
        None,
        alias=f"{PREFIX}_abstain_score",
        description="Score beyond whose bound an answer is marked as abstaining.",
    )
    abstain_above: FiniteFloat | None = Field(
        None, alias=f"{PREFIX}_abstain_above", description="The answer abstains if the score is greater."
    )
    abstain_below: FiniteFloat | None = Field(
        None, alias=f"{PREFIX}_abstain_below", description="The answer abstains if the score is less."
    )
    forks: int | None = _fork("branches", f"{PREFIX}_forks")
    fork_width: int | None = _fork("width")
    fork_entropy: float | None = _fork("entropy")
    fork_budget: int | None = _fork("budget")
    fork_horizon: int | None = _fork("horizon")
    fork_select: str | None = _fork("select")
    fork_answer: str | None = _fork("answer")
    fork_share: float | None = _fork("share")

    # What the request says of a chain, once its sampler is known to be one: see samplers/registry.py.
    _chain: ChainRequest | None = PrivateAttr(default=None)

    @property
    def chain(self) -> ChainRequest | None:
        """The request's chain and its settings; None: its sampler is none, or isn't known."""
        return self._chain

    def with_chain(self, asked: ChainRequest) -> Self:
        """The same, with a chain."""
        copy = self.model_copy()
        copy._chain = asked
        return copy

    @field_validator(
        *("temperature", "top_p", "top_k", "min_p", "abstain_above", "abstain_below"),
        *("forks", "fork_width", "fork_entropy", "fork_budget", "fork_horizon", "fork_share"),
        mode="before",
    )
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any) -> Any:
        return refuse_truth_value(value)

    @model_validator(mode="after")
    def _abstains_by_a_score_and_a_bound(self) -> Self:
        bounds = [name for name in ("abstain_above", "abstain_below") if getattr(self, name) is not None]
        if self.abstain_score is None and bounds:
            raise ValueError(f"{PREFIX}_{bounds[0]} is given without {PREFIX}_abstain_score; name the score, or leave it out")
        if self.abstain_score is not None and not bounds:
            raise ValueError(
                f"{PREFIX}_abstain_score is {quoted(self.abstain_score)} without a bound; add {PREFIX}_abstain_above or _below"
            )
        if self.abstain_score is not None and self.scores is False:
            raise ValueError(f"{PREFIX}_abstain_score is given, but {PREFIX}_scores is off; leave one of them out")
        return self

    @property
    def abstention(self) -> Abstention | None:
        """When the answer is marked; None: never."""
        if self.abstain_score is None:
            return None
        return Abstention(self.abstain_score, self.abstain_above, self.abstain_below)

    def is_scored(self, default: bool) -> bool:
        """Is the answer scored? ``default``: what the server does where a request doesn't say."""
        if self.scores is not None:
            return self.scores
        return default or self.abstain_score is not None

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> RequestSettings:
        """Settings among a request's ``extra_args``; other plugins' names are left alone.

        Raises:
            ConfigError: a name that is one of ours misspelt, or a bad value; names the key, the value and what is allowed.
        """
        if not extra_args:
            return _nothing(cls)
        if not isinstance(extra_args, Mapping):
            raise ConfigError(f"a request's settings are {quoted(extra_args)}, but they should be a table")
        names = cls.names()
        for key in extra_args:
            if key not in names:
                _refuse_misspelt(key, cls)
        ours = {key: extra_args[key] for key in names if key in extra_args}
        if not ours:
            return _nothing(cls)
        try:
            return cls.model_validate(ours)
        except ValidationError as error:
            raise ConfigError(describe(error, cls)) from None

    @classmethod
    def names(cls) -> Mapping[str, str]:
        """What the settings are called → the letters that matter in it."""
        return _names(cls)

    def of_sampler(self, name: str) -> dict[str, float]:
        """What the request says of a sampler's own numbers."""
        marked = f"{name}{OF_SAMPLER}"
        said = ((field, getattr(self, field)) for field in type(self).model_fields if field.startswith(marked))
        return {field.removeprefix(marked): float(value) for field, value in said if value is not None}

    def keys_of(self, name: str) -> list[str]:
        """Keys of what the request says to this sampler alone."""
        fields = type(self).model_fields
        theirs = _OF_ENTROPIX if name == PREFIX else [field for field in fields if field.startswith(f"{name}{OF_SAMPLER}")]
        return [str(fields[field].alias) for field in theirs if getattr(self, field) is not None]

    def fork_keys(self) -> list[str]:
        """Keys of what the request says of forks."""
        fields = type(self).model_fields
        return [str(fields[name].alias) for name in fields if name.startswith("fork") and getattr(self, name) is not None]

    def forks_of(self, server: Forks) -> Forks:
        """How this request forks: as its preset, if that one does, or else as the server; but for what it says itself."""
        preset = None if self.preset is None else _preset(self.preset, "corrected").forks
        base = server if preset is None or preset.branches == 1 else preset
        own = {"branches": self.forks} | {
            name.removeprefix("fork_"): getattr(self, name) for name in type(self).model_fields if name.startswith("fork_")
        }
        return base.model_copy(update={name: value for name, value in own.items() if value is not None})

    def config(self, server: EntropixConfig) -> EntropixConfig:
        """The configuration that this request starts from: the server's, or the preset it names."""
        return server if self.preset is None else _preset(self.preset, server.fidelity)

    def constants(self, server: EntropixConfig, own: Mapping[str, float]) -> list[float]:
        """This request's numbers, in the order of :meth:`EntropixConfig.numbers`.

        Args:
            server: the server's configuration.
            own: the request's own temperature, top_p, top_k and min_p, used if ``base``, or else the server's
                ``base.source``, is ``request``.
        """
        source = self.base or server.base.source
        numbers = dict(self.config(server).numbers())
        for name in BaseParameters.model_fields:
            value = getattr(self, name)
            if value is None and source == "request":
                value = own[name]
            if value is not None:
                numbers[f"base.{name}"] = float(value)
                if name == "min_p":  # a request knows one min_p, which is ADAPTIVE's as well
                    numbers["adaptive.min_p"] = float(value)
        numbers.update({name: value for name, value in (self.own_constants or {}).items() if name in numbers})
        return list(numbers.values())


@cache
def _nothing(cls: type[RequestSettings]) -> RequestSettings:
    return cls()


@cache
def _names(cls: type[RequestSettings]) -> dict[str, str]:
    return {str(field.alias): str(field.alias).replace("_", "") for field in cls.model_fields.values()}


def _refuse_misspelt(key: Any, cls: type[RequestSettings]) -> None:
    """ConfigError if ``key``, which is no setting, is meant as one: ``entropix.trace``, ``Entropix-Trace``, ``entropx``."""
    if not isinstance(key, str):
        raise ConfigError(f"a request's settings have the key {quoted(key)}, but keys should be text")
    problem = _misspelt(key[:QUOTED], cls)
    if problem is not None:
        raise ConfigError(f"unknown setting {quoted(key)}; {problem}")


@lru_cache(maxsize=1024)
def _misspelt(key: str, cls: type[RequestSettings]) -> str | None:
    """What there is instead of a name that looks like ours; None for another plugin's."""
    letters = re.sub("[^a-z0-9]", "", key.lower())
    names = cls.names()
    close = get_close_matches(letters, names.values(), n=1, cutoff=0.9)
    if close:
        return f"did you mean {next(name for name, known in names.items() if known == close[0])!r}?"
    return f"there are {', '.join(names)}" if letters.startswith(PREFIX) else None


@cache
def _preset(name: str, fidelity: Fidelity) -> EntropixConfig:
    return EntropixConfig.preset(name, fidelity=fidelity)
