"""``--sampler`` and ``--sampler-config``, and the same two keywords of ``LLM(...)``.

Both end in ``additional_config["entropix"]``, which vLLM carries to every process, and nothing else of them stays: parsed
arguments can be copied, pickled and passed on. What wins over what is in docs/settings.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix.settings import as_mapping
from vllm_entropix.samplers.observed import VLLM
from vllm_entropix.settings.errors import ConfigError, quoted
from vllm_entropix.settings.load import merge as overlay

KEY = "entropix"
# What the two are called on a command line, and in Python.
_OPTIONS = ("--sampler {}", "--sampler-config")
_KEYWORDS = ("sampler={!r}", "sampler_config")


class FromCommandLine(dict[str, Any]):
    """An additional config that came from a command line, whose user is told in one line and not by a traceback."""


class FromFile(str):
    """A value of an option that stands in the file of ``--config``, which the command line goes before."""


@dataclass(frozen=True)
class Words:
    """What one source says of the sampler.

    Attributes:
        samplers: names, the last of which holds.
        settings: mappings, JSON texts, presets or files, each laid over those before it.
    """

    samplers: Sequence[Any] = ()
    settings: Sequence[Any] = ()


def check_sampler(name: Any) -> str:
    """The sampler's name; ConfigError if there is none of this name."""
    return registry.check(name, others=(VLLM,))


def merge(additional: Mapping[str, Any], *sources: Words, names: tuple[str, str] = _KEYWORDS) -> dict[str, Any]:
    """``additional`` with the sampler that is asked for, and its settings, in it.

    Args:
        additional: an additional config, which may ask for the sampler itself, with settings that others are laid over.
        sources: what is said beside it, from the weakest to the strongest.
        names: what an error calls the sampler and its settings.

    Raises:
        ConfigError: settings for a sampler that isn't asked for, or one of the values can't be.
    """
    sampler_name, settings_name = names
    # The last word on the sampler is that of the strongest source that has one.
    sampler, last = None, 0
    for index, source in enumerate(sources):
        for name in source.samplers:
            sampler, last = check_sampler(name), index
    merged = dict(additional)
    before = merged.get(KEY)
    asked = sampler not in (None, VLLM) or (sampler is None and before is not None and before is not False)
    # What a stronger source switches off may have settings.
    settings = list(chain.from_iterable(source.settings for source in sources[0 if asked else last :]))
    if sampler == VLLM and any(as_mapping(over).get("signals") for over in settings):
        # vLLM draws, and what it draws is looked at: these settings, and none of what is switched off.
        asked, before = True, None
    if settings and not asked:
        wanted = sampler_name.format("entropix")
        raise ConfigError(
            f"{settings_name} is given without {wanted}; leave it out, or ask for {wanted}"
            if sampler is None
            else f"{settings_name} is given with {sampler_name.format(sampler)}, which has no settings unless signals is true; "
            f"leave it out, set signals, or ask for {wanted}"
        )
    if sampler == VLLM and not asked:
        merged.pop(KEY, None)
    elif sampler is not None or settings:
        table = {} if before is None or isinstance(before, bool) else as_mapping(before)
        for over in settings:
            table = overlay(table, as_mapping(over))
        if sampler is not None and sampler != table.get("sampler", KEY):
            table["sampler"] = sampler
        merged[KEY] = table
    return merged


def merge_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of EngineArgs with ``sampler`` and ``sampler_config`` moved into ``additional_config``."""
    rest = dict(keywords)
    sampler, settings = rest.pop("sampler", None), rest.pop("sampler_config", None)
    if sampler is None and settings is None:
        return rest
    said = Words(*([] if given is None else [given] for given in (sampler, settings)))
    rest["additional_config"] = merge(_table(rest.get("additional_config")), said)
    return rest


def _table(additional: Any) -> Mapping[str, Any]:
    if additional is not None and not isinstance(additional, Mapping):
        raise ConfigError(f"additional_config is {quoted(additional)}, but it should be a table")
    return additional or {}


def add_arguments(parser: Any) -> Any:
    """Add the two options to vLLM's parser, whose parsed arguments then hold what they ask for as ``additional_config``."""
    if "--sampler" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group(title="entropix", description="Which sampler draws the tokens (plugin vllm-entropix).")
    group.add_argument(
        "--sampler",
        action="append",
        metavar="NAME|CHAIN",
        help="entropix samples each token according to the model's uncertainty about it; `vllm-entropix samplers` lists the "
        "others. Names with ';' between them are a chain, in the order in which they act. Default: vllm, of which "
        "`--sampler-config.signals true` measures what it draws.",
    )
    group.add_argument(
        "--sampler-config",
        action="append",
        metavar="PRESET|JSON|FILE",
        help="Settings of the sampler: a preset's name, JSON text, or a .json, .toml or .yaml file. If there are "
        "several, each is laid over those before it. `vllm-entropix presets` lists presets and settings.",
    )
    parse = parser.parse_known_args

    # Only when all is parsed is it known what wins, whatever the order of the options.
    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        namespace, unknown = parse(*args, **kwargs)
        try:
            _settle(namespace)
        except ConfigError as error:
            parser.exit(1, f"{parser.prog}: error: {error}\n")
        return namespace, unknown

    parser.parse_known_args = parse_known_args
    return parser


def _settle(namespace: argparse.Namespace) -> None:
    """Move the two options of parsed arguments into their ``additional_config``."""
    said = vars(namespace)
    samplers, settings = said.pop("sampler", None) or [], said.pop("sampler_config", None) or []
    additional = said.get("additional_config")
    if samplers or settings or (isinstance(additional, Mapping) and KEY in additional):
        of_file, of_line = (Words(_from(file, samplers), _from(file, settings)) for file in (True, False))
        said["additional_config"] = FromCommandLine(merge(_table(additional), of_file, of_line, names=_OPTIONS))


def _from(file: bool, values: Sequence[str]) -> list[str]:
    return [value for value in values if isinstance(value, FromFile) is file]


def mark_as_of_file(arguments: list[str]) -> list[str]:
    """The arguments that vLLM reads out of the file of ``--config``, with the values of ours marked as such.

    Afterwards they stand in one list with the command line's own. Dotted ones are made one here, as vLLM would do with those of
    both sources together.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    ours: list[str] = []
    others: list[str] = []
    target = others
    for argument in arguments:
        if argument.startswith("--"):
            target = ours if argument.replace("_", "-").startswith("--sampler") else others
        target.append(argument)
    if not ours:
        return arguments
    parser = FlexibleArgumentParser(prog="vllm --config", add_help=False)
    parser.add_argument("--sampler", action="append", default=[])
    parser.add_argument("--sampler-config", action="append", default=[])
    found = parser.parse_args(ours)
    for option, values in (("--sampler", found.sampler), ("--sampler-config", found.sampler_config)):
        for value in values:
            others += [option, FromFile(value)]
    return others
