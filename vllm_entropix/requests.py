"""Per-request settings: their names, what they may be, and how they lie over the server's configuration.

Offline they are ``SamplingParams(extra_args={...})``, over HTTP ``vllm_xargs``, whose values are strings, numbers or lists.
Hence flat names and tolerant booleans.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vllm_entropix.config import BaseParameters, ConfigError, EntropixConfig, Fidelity, describe

PREFIX = "entropix"

_ON = frozenset({"on", "true", "yes", "1", "1.0"})
_OFF = frozenset({"off", "false", "no", "0", "0.0"})


def _switch(value: Any) -> bool:
    word = str(value).strip().lower()
    if word in _ON:
        return True
    if word in _OFF:
        return False
    raise ValueError("it should be on or off")


def _known_preset(value: Any) -> Any:
    if value not in EntropixConfig.preset_names():
        raise ValueError(f"there are {', '.join(EntropixConfig.preset_names())}")
    return value


def _base(name: str) -> Any:
    """A field of the same range as the server's base parameter of this name."""
    source = BaseParameters.model_fields[name]
    field: Any = Field(None, alias=f"{PREFIX}_{name}", description=f"This request's {source.description}")
    field.metadata.extend(source.metadata)
    return field


Switch = Annotated[bool, BeforeValidator(_switch)]


class RequestSettings(BaseModel):
    """What one request may say about entropix. Everything is optional; names as users write them are the aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: Switch = Field(True, alias=PREFIX, description="on or off; off samples as vLLM does without the plugin.")
    preset: Annotated[str, BeforeValidator(_known_preset)] | None = Field(
        None, alias=f"{PREFIX}_preset", description="Preset whose constants this request uses instead of the server's."
    )
    base: Literal["preset", "request"] = Field(
        "preset",
        alias=f"{PREFIX}_base",
        description="Take base temperature, top_p, top_k and min_p from the preset, or from the request's own parameters.",
    )
    temperature: float | None = _base("temperature")
    top_p: float | None = _base("top_p")
    top_k: int | None = _base("top_k")
    min_p: float | None = _base("min_p")
    clarification: Switch | None = Field(
        None, alias=f"{PREFIX}_clarification", description="on or off: may clarification tokens be forced into this request?"
    )
    trace: Switch | None = Field(None, alias=f"{PREFIX}_trace", description="on or off: return a record per generated token.")

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> RequestSettings:
        """Settings among a request's ``extra_args``; other plugins' names are left alone.

        Raises:
            ConfigError: an unknown ``entropix…`` name or a bad value; names the key, the value and what is allowed.
        """
        ours = {key: value for key, value in (extra_args or {}).items() if key == PREFIX or key.startswith(f"{PREFIX}_")}
        if not ours:
            return _DEFAULTS
        try:
            return cls.model_validate(ours)
        except ValidationError as error:
            raise ConfigError(describe(error, cls)) from None

    def config(self, server: EntropixConfig) -> EntropixConfig:
        """The configuration that this request starts from: the server's, or the preset it names."""
        return server if self.preset is None else _preset(self.preset, server.fidelity)

    def constants(self, server: EntropixConfig, own: Mapping[str, float]) -> list[float]:
        """This request's numbers, in the order of :meth:`EntropixConfig.numbers`.

        Args:
            server: the server's configuration.
            own: the request's own temperature, top_p, top_k and min_p, used if ``base`` is ``request``.
        """
        numbers = dict(self.config(server).numbers())
        for name in BaseParameters.model_fields:
            value = getattr(self, name)
            if value is None and self.base == "request":
                value = own[name]
            if value is not None:
                numbers[f"base.{name}"] = float(value)
                if name == "min_p":  # a request knows one min_p, which is ADAPTIVE's as well
                    numbers["adaptive.min_p"] = float(value)
        return list(numbers.values())


_DEFAULTS = RequestSettings()


@cache
def _preset(name: str, fidelity: Fidelity) -> EntropixConfig:
    return EntropixConfig.preset(name, fidelity=fidelity)
