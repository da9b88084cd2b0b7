"""``--sampler`` and ``--sampler-config``, and the same two keywords of ``LLM(...)``.

Both end in ``additional_config["entropix"]``, which vLLM carries to every process.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_entropix.config import ConfigError, as_mapping

SAMPLERS = ("vllm", "entropix")
KEY = "entropix"


class FromCommandLine(dict[str, Any]):
    """An additional config that came from a command line, whose user is told in one line and not by a traceback."""


def check_sampler(name: Any) -> str:
    """The sampler's name; ConfigError if there is none of this name."""
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler {name!r}; there are {' and '.join(SAMPLERS)}")
    return str(name)


def merge(additional: Mapping[str, Any], sampler: str | None, settings: Any) -> dict[str, Any]:
    """``additional`` with the sampler's settings in it.

    Args:
        additional: an additional config, perhaps with settings of ours that the new ones are laid over.
        sampler: ``entropix`` switches on, ``vllm`` off, None leaves it.
        settings: a mapping, JSON text, preset or file; None for none.
    """
    merged = dict(additional)
    if sampler is not None and check_sampler(sampler) == "vllm":
        merged.pop(KEY, None)
        if settings is not None:
            raise ConfigError("sampler_config belongs to the sampler entropix; leave it out, or ask for sampler entropix")
        return merged
    before = merged.get(KEY)
    known = {} if before is None or before is True else as_mapping(before)
    merged[KEY] = _over(known, as_mapping(settings))
    return merged


def _over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def merge_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of EngineArgs with ``sampler`` and ``sampler_config`` moved into ``additional_config``."""
    rest = dict(keywords)
    sampler, settings = rest.pop("sampler", None), rest.pop("sampler_config", None)
    if sampler is None and settings is None:
        return rest
    if sampler is None:
        raise ConfigError("sampler_config is given without sampler='entropix'")
    rest["additional_config"] = merge(rest.get("additional_config") or {}, sampler, settings)
    return rest


def add_arguments(parser: Any) -> Any:
    """Add the two options to vLLM's parser, and let them share ``--additional-config``'s place."""
    if "--sampler" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group(title="entropix", description="Which sampler draws the tokens (plugin vllm-entropix).")
    group.add_argument(
        "--sampler",
        action=_SamplerAction,
        default=None,
        metavar="{vllm,entropix}",
        help="entropix samples each token according to the model's uncertainty about it. Default: vllm.",
    )
    group.add_argument(
        "--sampler-config",
        action=_SettingsAction,
        default=None,
        metavar="PRESET|JSON|FILE",
        help="Settings of the sampler entropix: a preset's name, JSON text, or a .json or .toml file. "
        "`vllm-entropix presets` lists presets and settings.",
    )
    additional = parser._option_string_actions.get("--additional-config")
    if additional is not None and type(additional) is argparse._StoreAction:
        # Otherwise whichever option comes last would win.
        additional.__class__ = _AdditionalConfigAction
    return parser


def _current(namespace: argparse.Namespace) -> FromCommandLine:
    return FromCommandLine(getattr(namespace, "additional_config", None) or {})


class _SamplerAction(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: str | Sequence[Any] | None, option: str | None = None
    ) -> None:
        with _one_line(parser):
            name = check_sampler(values)
            setattr(namespace, self.dest, name)
            waiting = getattr(namespace, "_sampler_settings", None)
            if name == "entropix":
                namespace.additional_config = FromCommandLine(merge(_current(namespace), name, waiting))


class _SettingsAction(argparse.Action):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: str | Sequence[Any] | None, option: str | None = None
    ) -> None:
        with _one_line(parser):
            settings = as_mapping(values)  # type: ignore[arg-type]
            setattr(namespace, self.dest, values)
            if getattr(namespace, "sampler", None) == "entropix":
                namespace.additional_config = FromCommandLine(merge(_current(namespace), "entropix", settings))
            else:
                namespace._sampler_settings = settings


class _AdditionalConfigAction(argparse._StoreAction):
    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: str | Sequence[Any] | None, option: str | None = None
    ) -> None:
        with _one_line(parser):
            before = _current(namespace)
            after = FromCommandLine(values if isinstance(values, Mapping) else {})
            if KEY in before:
                own = after.get(KEY)
                after[KEY] = _over({} if own is None or own is True else as_mapping(own), before[KEY])
            setattr(namespace, self.dest, after)


class _one_line:  # noqa: N801
    """Ends the process with one line and status 1 if a configuration is wrong."""

    def __init__(self, parser: Any) -> None:
        self.parser = parser

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ConfigError):
            self.parser.exit(1, f"{self.parser.prog}: error: {error}\n")
