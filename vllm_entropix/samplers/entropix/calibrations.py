"""Calibrations that are kept: a settings file for each model, found again by the model's fingerprint.

They lie in ``$ENTROPIX_CALIBRATIONS``, or else in the user's cache. A preset that ships says in the same line whose it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_entropix.samplers.entropix.presets import preset_names, preset_text, read_preset
from vllm_entropix.settings.errors import ConfigError
from vllm_entropix.settings.load import read_mapping

# What ``thresholds`` says to have the model calibrated when the server starts.
AUTO = "auto"
FOLDER = "ENTROPIX_CALIBRATIONS"
# What is found for a model.
SECTIONS = ("thresholds", "helv", "lehv", "hehv", "adaptive")
_LINE = re.compile(r"^# Fingerprint: ([0-9a-f]{32})$", re.M)
_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
# Read of each file of weights: so many pieces, evenly spread, of so many bytes.
_PIECES, _BYTES = 8, 4096


def is_auto(settings: Mapping[str, Any]) -> bool:
    """Do settings ask for a calibration at the start?"""
    return bool(settings.get("thresholds") == AUTO)


def without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they can be checked without the model: what a calibration will say is left out."""
    return {name: value for name, value in settings.items() if not (name == "thresholds" and value == AUTO)}


def folder() -> Path:
    """Where calibrations are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(FOLDER) or cache / "vllm-entropix" / "calibrations")


def fingerprint(model: str, revision: str | None = None) -> str | None:
    """32 hexadecimal digits that change with a model's weights or tokenizer; None: its files aren't on this machine.

    Weights are told by names, sizes, the index that parts of a model share, and some pieces of each file, which
    tell two models of the same shape apart. No file of weights is read in full.

    Args:
        model: a folder, a GGUF file, or a name on Hugging Face.
        revision: of a name on Hugging Face.
    """
    path = _path_of(model, revision)
    if path is None:
        return None
    place = path if path.is_dir() else path.parent
    weights = [path] if path.is_file() else next((found for kind in _WEIGHTS if (found := sorted(path.glob(kind)))), [])
    if not weights:
        return None
    digest = hashlib.sha256()
    try:
        for file in weights:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode(errors="surrogateescape"))
            with file.open("rb") as opened:
                for piece in range(_PIECES):
                    opened.seek(size * piece // _PIECES)
                    digest.update(opened.read(_BYTES))
        for file in sorted(place.glob("*.index.json")):
            digest.update(file.read_bytes())
        tokenizer = next((place / name for name in _TOKENIZERS if (place / name).is_file()), None)
        if tokenizer is not None:
            digest.update(tokenizer.read_bytes())
    except OSError:
        return None
    return digest.hexdigest()[:32]


def _path_of(model: str, revision: str | None) -> Path | None:
    path = Path(model)
    if path.exists():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:  # not downloaded yet, no name of a model, or no such package: it has no fingerprint then
        return None


def line(of: str) -> str:
    """The comment by which a file says whose it is."""
    return f"Fingerprint: {of}"


def find(of: str) -> str | None:
    """Path of the calibration that the user keeps of a model, or else the preset that ships for it; None: there is neither."""
    kept = folder() / f"{of}.toml"
    if kept.is_file():
        return str(kept)
    return next((name for name in preset_names() if (said := _LINE.search(preset_text(name))) and said[1] == of), None)


def settings_of(found: str) -> dict[str, Any]:
    """What a calibration says, of a path or a preset's name as :func:`find` gives it: preset, borders and parameters."""
    said = read_preset(found) if found in preset_names() else read_mapping(Path(found), "calibration")
    return {name: said[name] for name in ("preset", *SECTIONS) if name in said}


def keep(of: str, text: str) -> Path:
    """Keep a calibration; ConfigError if it can't be written. Nobody reads half of it."""
    path = folder() / f"{of}.toml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    return path


@contextmanager
def alone(of: str) -> Iterator[None]:
    """Be the only process of this machine that calibrates a model; ConfigError if the folder can't be written."""
    path = folder() / f"{of}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unwritable(place: Path, error: OSError) -> ConfigError:
    return ConfigError(f"can't keep calibrations in {place}: {error.strerror or error}; {FOLDER} names another folder")
