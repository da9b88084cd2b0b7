"""Which samplers there are: those of this folder, and those that other packages register as entry points.

An entry point of the group ``vllm_entropix.samplers`` names a class of the kind of :class:`~.base.Sampler`. One that can't be
used is remembered with its reason, and refused by name when somebody asks for it: it does no harm to those who don't.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, get_args

from pydantic import BeforeValidator, Field, ValidationError, create_model
from pydantic_core import PydanticUndefined

from vllm_entropix.records import fields
from vllm_entropix.records.line import SamplerPart, register_part
from vllm_entropix.samplers import chain, chained
from vllm_entropix.samplers.base import Sampler
from vllm_entropix.samplers.entropix.calibrations import is_auto
from vllm_entropix.samplers.entropix.settings import EntropixConfig, as_mapping
from vllm_entropix.samplers.folder import classes_of
from vllm_entropix.samplers.observed import VLLM as VLLM
from vllm_entropix.samplers.observed import Observed
from vllm_entropix.samplers.request import OF_SAMPLER, PREFIX, RequestSettings
from vllm_entropix.settings.errors import QUOTED, ConfigError, cut, quoted
from vllm_entropix.settings.section import Section, describe, refuse_truth_value
from vllm_entropix.settings.server import BaseParameters

if TYPE_CHECKING:
    from vllm_entropix.samplers.stage import Stage
    from vllm_entropix.settings.server import ServerSettings

logger = logging.getLogger(__name__)

GROUP = "vllm_entropix.samplers"
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
        if sampler is not Observed:  # there without a plugin, too
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
    if name in (VLLM, *found.classes, *chain.names(), *EntropixConfig.model_fields):
        raise ValueError("there is another of this name")
    settings = getattr(sampler, "Settings", None)
    if not (inspect.isclass(settings) and issubclass(settings, Section)):
        raise ValueError("its Settings are no vllm_entropix.settings.section.Section")
    try:
        settings()
    except ValidationError as error:
        raise ValueError(f"its Settings need a default each: {describe(error, settings)}") from None
    taken = {
        *RequestSettings.names(),
        *chained.request_names(),
        *(key for one in found.classes.values() for key, _ in request_keys(one)),
    }
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
    """``name``, if it is a sampler's, a chain of such, or one of ``others``.

    Raises:
        ConfigError: says what there is, or why it can't be used.
    """
    if isinstance(name, str) and (name in registry().classes or name in others):
        return name
    if isinstance(name, str) and name in registry().refused:
        raise ConfigError(registry().refused[name])
    try:
        return chain.SEPARATOR.join(chain.parse_names(name))
    except ConfigError:
        if isinstance(name, (list, tuple)) or chain.SEPARATOR in str(name):
            raise
    *most, last = (*others, *names())
    raise ConfigError(
        f"unknown sampler {quoted(name)}; there are {', '.join(most)} and {last}, "
        f"and chains of {', '.join(chain.names())} with {chain.SEPARATOR!r} between them"
    )


def instances(server: ServerSettings) -> dict[str, Sampler]:
    """Each sampler, made for a server of these settings."""
    return {name: sampler(server) for name, sampler in registry().classes.items()}


def instances_and_observed(server: ServerSettings) -> dict[str, Sampler]:
    """The same with vLLM's own beside them, for rows that are only observed."""
    return {**instances(server), VLLM: Observed(server)}


def class_of(name: str) -> type[Sampler]:
    """The class of a sampler that a request may have."""
    return Observed if name == VLLM else registry().classes[name]


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
    for name, stage in chain.stages().items():
        section = _section_of_stage(stage)
        if name not in sections and section is not None:
            sections[name] = (section, Field(default_factory=section, description=_first_line(stage)))
    return create_model("ServerConfig", __base__=EntropixConfig, __module__=__name__, **sections)


def _section_of_stage(stage: type[Stage]) -> type[Section] | None:
    """The server's settings of a chain's sampler: without those that are a request's own fields; None if none are left."""
    own = [name for name in stage.Settings.model_fields if name not in BaseParameters.model_fields]
    if not own:
        return None
    if len(own) == len(stage.Settings.model_fields):
        return stage.Settings
    numbers: dict[str, Any] = {
        name: (info.annotation, info) for name, info in stage.Settings.model_fields.items() if name in own
    }
    return create_model(
        f"{stage.Settings.__name__}OfServer", __base__=Section, __module__=__name__, __doc__=stage.Settings.__doc__, **numbers
    )


def load_server(wanted: Any) -> EntropixConfig:
    """A server's settings from what a user gives: true, a table, JSON text, a preset's name or a file.

    Raises:
        ConfigError: a setting is unknown or out of range, or there is no such sampler.
    """
    table = {} if wanted is True else as_mapping(wanted)
    if is_auto(table):
        raise ConfigError("thresholds is auto, which only an engine makes numbers of when it starts; leave it out here")
    config = server_settings().from_dict(table)
    check(config.sampler, others=(VLLM,))
    if config.sampler == VLLM and not config.signals:
        raise ConfigError("the sampler vllm has no settings unless signals is true; set it, or leave entropix out")
    if sampler_of(RequestSettings(), config) == chained.NAME:
        chained.read(config.sampler, {}, config)
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
    """What a request calls the choice of its sampler, and the settings of each: names without the prefix of ours."""
    return frozenset(name for name in request_settings().names() if not name.startswith(PREFIX)) | chained.request_names()


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
    if extra_args and not isinstance(extra_args, Mapping):
        return request_settings().parse(extra_args)  # which refuses it
    said: Mapping[str, Any] = extra_args or {}
    of_chain = {key: said[key] for key in said if isinstance(key, str) and key in chain.setting_names()}
    text = request_settings().parse({"samplers": said["samplers"]} if "samplers" in said else None).sampler
    if text is None and server is not None:
        text = _sampler_of_server(server)
    elif text is not None:
        _check_of_request(text)
    if text is None or _class_of(text) != chained.NAME:
        # A sampler that plans by itself has some of these settings, too.
        mine = request_settings().names()
        stray = next((key for key in of_chain if key not in mine and key in chained.request_names()), None)
        found = request_settings().parse(extra_args)
        if stray is not None and server is not None and found.enabled:
            raise ConfigError(f"{stray} is a setting of chains, but this request's sampler is {text}; name a chain in samplers")
    else:
        found = request_settings().parse({key: said[key] for key in said if key not in of_chain})
        refuse_misspelt_of_chain(said)
        if server is not None or "samplers" in said:
            found = found.with_chain(chained.read(text, of_chain, {} if server is None else server))
    if server is None:
        return found
    if found.own_constants is not None and found.enabled and not _takes_constants(server):
        raise ConfigError(
            f"{PREFIX}_constants is given, but the server takes none; leave it out, or start the server of a study with "
            "experiments.constants on"
        )
    chosen = sampler_of(found, server)
    allowed = {chosen, *(found.chain.names if found.chain is not None else ())}
    for name in registry().classes:
        if name not in allowed and (keys := found.keys_of(name)):
            raise ConfigError(f"{keys[0]} is a setting of the sampler {name}, but this request's is {chosen}")
    return found


def _takes_constants(server: Mapping[str, Any] | ServerSettings) -> bool:
    if isinstance(server, Mapping):
        return bool(server["experiments"]["constants"])
    return isinstance(server, EntropixConfig) and server.experiments.constants


def is_off(extra_args: Mapping[str, Any] | None) -> bool:
    """Does a request switch us off? What else it says was never looked at, if vLLM made it for itself."""
    said = extra_args or {}
    return PREFIX in said and not request_settings().parse({PREFIX: said[PREFIX]}).enabled


def _check_of_request(text: str) -> None:
    """ConfigError if a request's ``samplers`` is no sampler's name and no chain."""
    try:
        check(text, others=(VLLM,))
    except ConfigError:
        if chain.SEPARATOR in text:
            raise
        raise ConfigError(
            registry().refused.get(text)
            or f"samplers is {quoted(text)}, but there are {', '.join(names())}, and chains of {', '.join(chain.names())}"
        ) from None


def refuse_misspelt_of_chain(keys: Iterable[Any]) -> None:
    """Refuse a key that is nearly a setting of a chain's sampler: nothing would read it.

    Raises:
        ConfigError: one is.
    """
    known = names_for_samplers()
    for key in keys:
        if isinstance(key, str) and key not in known and key not in request_settings().names():
            close = get_close_matches(key[:QUOTED].lower().replace("-", "_"), sorted(known), n=1, cutoff=0.9)
            if close:
                raise ConfigError(f"unknown setting {quoted(key)}; did you mean {close[0]!r}?")


def _class_of(text: str) -> str:
    """Name of the sampler that a text asks for: its own, or that of chains.

    Raises:
        ConfigError: it asks for none.
    """
    name = check(text, others=(VLLM,))
    return name if name in (VLLM, *registry().classes) else chained.NAME


def sampler_of(request: RequestSettings, server: Mapping[str, Any] | ServerSettings) -> str:
    """Name of the sampler that draws a request's tokens; that of chains stands for any chain."""
    return _class_of(_sampler_of_server(server) if request.sampler is None else request.sampler)


def name_of_sampler(request: RequestSettings, server: Mapping[str, Any] | ServerSettings) -> str:
    """What draws a request's tokens, as a request's ``samplers`` names it: a sampler, or a chain by those in it."""
    return sampler_of(request, server) if request.chain is None else request.chain.text


def _sampler_of_server(server: Mapping[str, Any] | ServerSettings) -> str:
    return str(server["sampler"] if isinstance(server, Mapping) else server.sampler)


def part(server: EntropixConfig, extra_args: Any = None) -> SamplerPart:
    """What a line of a trace file tells of the sampler of a request with these ``extra_args``."""
    request = parse_request(extra_args, server)
    return class_of(sampler_of(request, server))(server).described(request)


def _first_line(sampler: type[Sampler] | type[Stage]) -> str:
    return (inspect.getdoc(sampler.Settings) or f"Settings of {sampler.name}.").splitlines()[0]
