"""The shipped presets: their names and their settings."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from vllm_entropix.settings.errors import ConfigError, quoted
from vllm_entropix.settings.load import merge

# The two that were published, whose values are shown side by side; of the others there is a sentence each.
PUBLISHED = ("jax-2024-10", "torch-2024-10")


@cache
def preset_names() -> tuple[str, ...]:
    """Names of the shipped presets, sorted."""
    folder = files(__name__)
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


@cache
def preset_text(name: str) -> str:
    """A shipped preset as TOML."""
    return (files(__name__) / f"{name}.toml").read_text(encoding="utf-8")


def read_preset(name: Any) -> dict[str, Any]:
    """The settings of a shipped preset; ConfigError that lists the presets if there is none of this name.

    What the calibration of a model doesn't say is the preset's that it names.
    """
    if not isinstance(name, str) or name not in preset_names():
        raise ConfigError(f"unknown preset {quoted(name)}; there are {', '.join(preset_names())}")
    said = tomllib.loads(preset_text(name))
    return said if said["preset"] == name else merge(read_preset(said["preset"]), said)


@cache
def preset_names_of_requests() -> tuple[str, ...]:
    """Names of the shipped presets that a request may ask for: all but those that switch regimes off for a whole server."""
    return tuple(name for name in preset_names() if read_preset(name).get("regimes", True))
