"""A table of settings from a JSON, TOML or YAML file or text."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from vllm_entropix.settings.errors import ConfigError, cut, quoted


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables as one; where both have a value ``over`` wins, and tables in them are merged the same way."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None  # PyYAML's messages have several lines
    return {} if data is None else data  # an empty file


READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    "": tomllib.loads,
}
SUFFIXES = ".json, .toml, .yaml or .yml"


def read_mapping(path: Path, what: str = "sampler config") -> dict[str, Any]:
    """The table of a JSON, TOML or YAML file; ConfigError that names the file if it is missing, broken or of another type.

    Args:
        path: of the file.
        what: the file is, for the message.
    """
    name, suffix = cut(str(path), 200), path.suffix.lower()
    if suffix not in READERS:
        raise ConfigError(f"the {what} {name} is a file of another kind; its name should end in {SUFFIXES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"can't read the {what} {name}: not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"can't read the {what} {name}: {reason}") from None
    kind = suffix.lstrip(".").replace("yml", "yaml").upper() or "TOML"
    data = parse(text, READERS[suffix], f"the {what} {name} is not valid {kind}")
    if not isinstance(data, dict):
        raise ConfigError(f"the {what} {name} holds a {type(data).__name__}, not a table of settings")
    return data


def parse(text: str, read: Callable[[str], Any], problem: str) -> Any:
    """What a text holds; ConfigError that begins with ``problem`` if it can't be read."""
    try:
        return read(text)
    except (ValueError, RecursionError) as error:  # the decoders' errors are ValueErrors, and so is a number of 5000 digits
        raise ConfigError(f"{problem}: {cut(str(error), 300)}") from None


def as_table(source: str | Path | Mapping[str, Any] | None, presets: Collection[str]) -> dict[str, Any]:
    """A settings table from nothing, a mapping, JSON text, a preset's name, or the path of a JSON, TOML or YAML file."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, Path):
        return read_mapping(source)
    if not isinstance(source, str):
        raise ConfigError(f"a sampler config is a table, JSON text, a preset's name or a file, not {type(source).__name__}")
    text = source.strip()
    if text.startswith("{"):
        data = parse(text, json.loads, "the sampler config is not valid JSON")
        assert isinstance(data, dict)  # it starts with a brace
        return data
    if text in presets:
        return {"preset": text}
    if "/" in text or Path(text).suffix.lower() in READERS.keys() - {""} or os.path.isfile(text):
        return read_mapping(Path(text))
    raise ConfigError(
        f"unknown preset {quoted(text)}; there are {', '.join(presets)}, or give JSON or a file whose name ends in {SUFFIXES}"
    )
