"""Which samplers there are: those of this folder, and those that other packages register as entry points.

An entry point of the group ``vllm_entropix.samplers`` names a class of the kind of :class:`~.base.Sampler`. One that can't be
used is remembered with its reason, and refused by name when somebody asks for it: it does no harm to those who don't.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BeforeValidator, Field, ValidationError, create_model
from pydantic_core import PydanticUndefined

from vllm_entropix.records import fields
from vllm_entropix.records.line import SamplerPart, register_part
from vllm_entropix.samplers.base import Sampler
from vllm_entropix.samplers.entropix.settings import EntropixConfig, as_mapping
from vllm_entropix.samplers.folder import classes_of
from vllm_entropix.samplers.request import OF_SAMPLER, PREFIX, RequestSettings
from vllm_entropix.settings.errors import ConfigError, cut, quoted
from vllm_entropix.settings.section import Section, describe, refuse_truth_value
from vllm_entropix.settings.server import BaseParameters

if TYPE_CHECKING:
    from vllm_entropix.settings.server import ServerSettings

logger = logging.getLogger(__name__)

GROUP = "vllm_entropix.samplers"
# vLLM's own, which makes no plan.
VLLM = "vllm"
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@dataclass(frozen=True)
class Registry:
    """All samplers.

    Attributes:
        classes: by name.
        refused: name of an entry point → why it can't be used, as a sentence.
    """

    classes: dict[str, type[Sampler]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@cache
def registry() -> Registry:
    """What is found, once a process."""
    found = Registry()
    for sampler in classes_of(Sampler):
        _add(found, sampler)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        package = entry.dist.name if entry.dist is not None else entry.value
        try:
            sampler = entry.load()
            _check(found, entry.name, sampler)
            _add(found, sampler)
        except (Exception, SystemExit) as error:  # a module that ends its process would end everybody's
            reason = cut(" ".join(str(error).split()) or type(error).__name__, 300)
            found.refused[entry.name] = f"the sampler {entry.name} of the package {package} can't be used: {reason}"
            logger.warning("vllm-entropix: %s", found.refused[entry.name])
    return found


def _add(found: Registry, sampler: type[Sampler]) -> None:
    fields.register(sampler.name, sampler.fields)
    if sampler.Part is not SamplerPart:
        register_part(sampler.name, sampler.Part)
    found.classes[sampler.name] = sampler


def _check(found: Registry, name: str, sampler: Any) -> None:
    """ValueError if a class of another package can't be a sampler."""
    if not (inspect.isclass(sampler) and issubclass(sampler, Sampler)):
        raise ValueError(f"{quoted(sampler)} is no subclass of vllm_entropix.samplers.base.Sampler")
    if inspect.isabstract(sampler):
        raise ValueError(f"{sampler.__name__} lacks {', '.join(sorted(sampler.__abstractmethods__))}")
    own = getattr(sampler, "name", None)
    if own != name or not _NAME.fullmatch(name):
        raise ValueError(f"its class is named {quoted(own)}; both should be one name in lower case")
    if name == VLLM or name in found.classes or name in EntropixConfig.model_fields:
        raise ValueError("there is another of this name")
    settings = getattr(sampler, "Settings", None)
    if not (inspect.isclass(settings) and issubclass(settings, Section)):
        raise ValueError("its Settings are no vllm_entropix.settings.section.Section")
    try:
        settings()
    except ValidationError as error:
        raise ValueError(f"its Settings need a default each: {describe(error, settings)}") from None
    taken = {*RequestSettings.names(), *(key for one in found.classes.values() for key, _ in request_keys(one))}
    for key, _ in request_keys(sampler):
        if key in taken:
            raise ValueError(f"a request's {key} is another setting")
        taken.add(key)
    part = sampler.Part
    if part is not SamplerPart and get_args(part.model_fields["name"].annotation) != (name,):
        raise ValueError(f"its Part lacks name: Literal[{name!r}]")
    # Every engine makes one of each sampler, whether it is asked for or not.
    made = sampler(EntropixConfig.preset())
    made.numbers()
    made.described(RequestSettings())


def known() -> None:
    """Register what samplers add to records, for a process that reads them alone."""
    registry()


def names() -> tuple[str, ...]:
    """Names of all samplers that plan, sorted."""
    return tuple(sorted(registry().classes))


def check(name: Any, others: tuple[str, ...] = ()) -> str:
    """``name``, if it is a sampler's or one of ``others``; ConfigError that says what there is, or why it can't be used."""
    if isinstance(name, str) and (name in registry().classes or name in others):
        return name
    if isinstance(name, str) and name in registry().refused:
        raise ConfigError(registry().refused[name])
    *most, last = (*others, *names())
    raise ConfigError(f"unknown sampler {quoted(name)}; there are {', '.join(most)} and {last}")


def instances(server: ServerSettings) -> dict[str, Sampler]:
    """Each sampler, made for a server of these settings."""
    return {name: sampler(server) for name, sampler in registry().classes.items()}


def has_section(sampler: type[Sampler]) -> bool:
    """Whether a sampler has a section of its own: entropix's settings stand beside the common ones."""
    return not issubclass(EntropixConfig, sampler.Settings)


def request_keys(sampler: type[Sampler]) -> list[tuple[str, str]]:
    """(what a request calls it, setting) of each number that a request may set: named after the sampler, once.

    temperature, top_p, top_k and min_p are none of them: a request has these of its own.
    """
    if not has_section(sampler):
        return []
    keys = [
        (name if name.startswith(sampler.name) else f"{sampler.name}_{name}", name)
        for name, info in sampler.Settings.model_fields.items()
        if info.annotation in (int, float)
    ]
    return [(key, name) for key, name in keys if key not in BaseParameters.model_fields]


@cache
def server_settings() -> type[EntropixConfig]:
    """The model of a server's settings: the common ones, and each sampler's section."""
    sections: dict[str, Any] = {
        name: (sampler.Settings, Field(default_factory=sampler.Settings, description=_first_line(sampler)))
        for name, sampler in sorted(registry().classes.items())
        if has_section(sampler)
    }
    return create_model("ServerConfig", __base__=EntropixConfig, __module__=__name__, **sections)


def load_server(wanted: Any) -> EntropixConfig:
    """A server's settings from what a user gives: true, a table, JSON text, a preset's name or a file.

    Raises:
        ConfigError: a setting is unknown or out of range, or there is no such sampler.
    """
    config = server_settings().from_dict({} if wanted is True else as_mapping(wanted))
    check(config.sampler)
    return config


@cache
def request_settings() -> type[RequestSettings]:
    """The model of a request's settings: the common ones, and the numbers of each sampler."""
    numbers: dict[str, Any] = {}
    for name, sampler in sorted(registry().classes.items()):
        for key, setting in request_keys(sampler):
            info = sampler.Settings.model_fields[setting]
            described: Any = Field(None, alias=key, description=f"This request's {info.description}")
            described.metadata.extend(info.metadata)
            assert info.default is not PydanticUndefined
            number: Any = Annotated[info.annotation, BeforeValidator(refuse_truth_value)]
            numbers[f"{name}{OF_SAMPLER}{setting}"] = (number | None, described)
    return create_model("SettingsOfRequest", __base__=RequestSettings, __module__=__name__, **numbers)


@cache
def names_for_samplers() -> frozenset[str]:
    """What a request calls the choice of its sampler, and the numbers of each: names without the prefix of ours."""
    return frozenset(name for name in request_settings().names() if not name.startswith(PREFIX))


def parse_request(extra_args: Any, server: Mapping[str, Any] | ServerSettings | None = None) -> RequestSettings:
    """A request's settings.

    Args:
        extra_args: of its SamplingParams.
        server: the server's settings, whose ``sampler`` holds if the request names none; None doesn't look at which sampler
            reads a setting.

    Raises:
        ConfigError: a name that is one of ours misspelt, a bad value, an unknown sampler, or a setting of a sampler that isn't
            the request's.
    """
    found = request_settings().parse(extra_args)
    if found.sampler is not None and found.sampler not in registry().classes:
        reason = registry().refused.get(found.sampler)
        raise ConfigError(reason or f"samplers is {quoted(found.sampler)}, but there are {', '.join(names())}")
    if server is None:
        return found
    chosen = sampler_of(found, server)
    for name in registry().classes:
        if name != chosen and (keys := found.keys_of(name)):
            raise ConfigError(f"{keys[0]} is a setting of the sampler {name}, but this request's is {chosen}")
    return found


def sampler_of(request: RequestSettings, server: Mapping[str, Any] | ServerSettings) -> str:
    """Name of the sampler that draws a request's tokens."""
    if request.sampler is not None:
        return request.sampler
    return str(server["sampler"] if isinstance(server, Mapping) else server.sampler)


def part(server: EntropixConfig, extra_args: Any = None) -> SamplerPart:
    """What a line of a trace file tells of the sampler of a request with these ``extra_args``."""
    request = parse_request(extra_args, server)
    return registry().classes[sampler_of(request, server)](server).described(request)


def _first_line(sampler: type[Sampler]) -> str:
    return (inspect.getdoc(sampler.Settings) or f"Settings of {sampler.name}.").splitlines()[0]
