"""Machine code on disk, keyed by its sources.

numba compiles a kernel anew when the kernel's own file has another date. What comes from other files is frozen into machine
code as well: functions that the kernel calls, constants, and the order of the settings. So what is kept lies in a folder named
by a hash of all of them, inside the one that numba would take.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[2]
_FOLDER = "vllm-entropix-"
# Folders that are kept, the newest first: each sampler with a kernel of its own has one, and so have versions that take turns.
_KEPT = 16


class _FolderOfSources:
    """A folder inside that of one of numba's locators."""

    def __init__(self, locator: Any, file: Path) -> None:
        self._locator = locator
        self._file = file
        self._path = Path(locator.get_cache_path()) / (_FOLDER + made_from(file))

    def get_cache_path(self) -> str:
        return str(self._path)

    def ensure_cache_path(self) -> None:
        """Called before something is kept."""
        if not self._path.is_dir():
            self._path.mkdir(parents=True, exist_ok=True)
            _remove_oldest(self._path.parent)

    def get_source_stamp(self) -> str:
        """What makes a file in the folder stale: nothing, the folder's name says it all."""
        return made_from(self._file)

    def get_disambiguator(self) -> str:
        return str(self._locator.get_disambiguator())


class _InFolderOfSources(CompileResultCacheImpl):  # type: ignore[misc]
    def __init__(self, kernel: Callable[..., Any]) -> None:
        super().__init__(kernel)
        self._locator: Any = _FolderOfSources(self._locator, Path(kernel.__code__.co_filename))


class MachineCode(FunctionCache):  # type: ignore[misc]
    """A kernel's machine code on disk. What can't be written is told and not kept."""

    _impl_class = _InFolderOfSources

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled for a signature."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            # The disk is full, or another process has just removed the folder.
            logger.warning("can't keep a compiled kernel in %s: %s", self.cache_path, error.strerror)


@cache
def kept_on_disk() -> bool:
    """Is there a folder that compiled kernels can be kept in: ``NUMBA_CACHE_DIR``, beside the package, or the user's cache?

    A container may have none of them. numba refuses to compile what it can't keep, unless it is told not to.
    """
    try:
        folder = MachineCode(kept_on_disk.__wrapped__).cache_path
    except RuntimeError:
        return False
    # Whose turn it was last is seen by the date.
    if os.path.isdir(folder):
        try:
            os.utime(folder)
        except OSError:
            logger.debug("can't touch %s", folder)
    return True


@cache
def made_from(file: Path) -> str:
    """A hash of all that the kernels in a file are made from, the order of the settings that they read among it.

    numba itself tells apart its own versions, Python's and the CPU's.
    """
    found = hashlib.sha256()
    for name, source in sorted(sources(file).items()):
        found.update(f"{name} {len(source)}\n".encode() + source)
    return found.hexdigest()[:16]


def sources(file: Path) -> dict[str, bytes]:
    """A file with kernels, all files of this folder, and what they import of the package, directly or not: path → content."""
    found: dict[str, bytes] = {}
    waiting = [file, *sorted(Path(__file__).parent.glob("*.py"))]
    while waiting:
        path = waiting.pop()
        name = path.relative_to(_PACKAGE).as_posix()
        if name not in found:
            found[name] = path.read_bytes()
            waiting.extend(_imported(found[name]))
    return found


def _imported(source: bytes) -> Iterator[Path]:
    """Files of the package that a file's source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            # A name may be a module's.
            names = [f"{node.module}", *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names):
            if parts[0] == _PACKAGE.name:
                module = _PACKAGE.joinpath(*parts[1:])
                yield from (path for path in (module.with_suffix(".py"), module / "__init__.py") if path.is_file())


def _remove_oldest(parent: Path) -> None:
    """Remove all folders but the last used ones.

    A process that still uses one has its code in memory; what it doesn't find it compiles.
    """
    dated = []
    for folder in parent.glob(_FOLDER + "*"):
        try:
            dated.append((folder.stat().st_mtime, folder))
        except OSError:
            continue  # another process removed it
    for _, folder in sorted(dated, reverse=True)[_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
