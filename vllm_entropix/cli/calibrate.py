"""``vllm-entropix calibrate``: borders and parameters of the regimes for a model, from what it says to prompts."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vllm_entropix._version import __version__
from vllm_entropix.cli.checks import require_model
from vllm_entropix.cli.demo import Prompt, load_prompts
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.observability import neutral
from vllm_entropix.observability.terminal import printable
from vllm_entropix.records.fields import names
from vllm_entropix.records.regimes import Regime
from vllm_entropix.records.trace import traces
from vllm_entropix.samplers.entropix import calibrations
from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET, EntropixConfig
from vllm_entropix.settings.errors import ConfigError

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

    from vllm_entropix.observability.calibration import Calibration, Measured

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_PROMPTS = Path(__file__).with_name("calibration_prompts.txt")
# A model that answers in a few words is asked again, so many times in all at most.
_ROUNDS = 8
_COLUMNS, _ROWS = 64, 18
_SMALLEST = 1e-6  # where the picture's logarithmic axes begin at the lowest
_SHADES = " ·░▒▓█"
_PLACES = {"model", "output", "svg"}  # options that say where something lies


def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Any model that vLLM can load; `demo` is the one that is shipped.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with a prompt per line, or JSON like the demo's; default: 144 questions that ship."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write what is found into this TOML file, too.")] = None,
    shares: Annotated[
        str | None,
        typer.Option(help="Target shares, as in LELV=0.5,HELV=0.02; default: LELV=0.4,HELV=0.01,LEHV=0.08,HEHV=0.03."),
    ] = None,
    strength: Annotated[
        float,
        typer.Option(
            min=0.5, max=2, help="Temperature where the model is unsure, relative to the base: above 1 warmer, below 1 cooler."
        ),
    ] = neutral.WARM,
    base: Annotated[str, typer.Option(help="Preset that everything else comes from.")] = DEFAULT_PRESET,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Put each prompt into the model's chat template; default: if it has one."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer at most.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the draws and of the split.")] = 0,
    engine: Annotated[str, typer.Option(help="Arguments of vLLM's LLM as JSON, as in '{\"tensor_parallel_size\": 2}'.")] = "{}",
    svg: Annotated[Path | None, typer.Option(help="Also write what is shown as an SVG picture.")] = None,
) -> None:
    """Run a model on prompts and find borders and parameters of its regimes; `serve` finds them again."""
    from vllm_entropix.observability.calibration import Measured, corrected, parse_shares, preset_text
    from vllm_entropix.observability.calibration import calibrate as fit

    targets = parse_shares(shares)
    config = EntropixConfig.preset(base)
    if not config.regimes:
        raise ConfigError(f"--base is {base}, which switches regimes off; name another preset")
    arguments = _arguments(engine)
    chosen = load_prompts(prompts or _PROMPTS)
    path = str(shipped_model()) if model == "demo" else model
    require_model(path)
    console = Console(record=svg is not None, width=110 if svg is not None else None)
    llm = _start(console, path, base, seed, arguments)
    asked, how = _asked(llm, chosen, chat)
    console.print(how)
    drawn = _measure(llm, asked, max_tokens, neutral.without_regimes(config.base.min_p), "without regimes")
    found = fit(drawn, targets, config, seed, strength)
    again = _measure(llm, asked, max_tokens, _constants(found.config), "with what was found")
    found = corrected(found, again, seed)
    _show(console, Measured.joined(again), config, found)
    if svg is not None:
        console.save_svg(str(svg), title="vllm-entropix calibrate")
    own = calibrations.fingerprint(path, arguments.get("revision"))
    made = f"{_command(context)} ({datetime.now(UTC).date()}, vllm-entropix {__version__})."
    notes = [made, how, *([] if own is None else [calibrations.line(own)])]
    text = preset_text(found, config, Path(path).name, notes)
    if output is not None:
        try:
            # A folder's name need not be UTF-8.
            output.write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:
            raise ConfigError(f"can't write {output}: {error.strerror}") from None
        command = f"  vllm serve {shlex.quote(path)} --sampler entropix --sampler-config {shlex.quote(str(output))}"
        # As Text, or brackets in a name would be markup.
        console.print(Text(printable(f"Wrote {output}. Serve with it:")), soft_wrap=True)
        console.print(Text(printable(command)), soft_wrap=True)
    if own is None:
        console.print("The model's files aren't on this machine, so a server won't find this calibration by itself.")
    else:
        told = f"Kept it in {calibrations.keep(own, text)}, where `vllm serve` with --sampler entropix finds it."
        console.print(Text(printable(told)), soft_wrap=True)


def _command(context: typer.Context) -> str:
    """The command as it was given, and files by name alone: others read it, too."""
    model = Path(context.params["model"])
    words = ["vllm-entropix", "calibrate", model.resolve().name if model.exists() else str(model)]
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if name in _PLACES or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append((option.opts if value else option.secondary_opts)[0])
        else:
            words += [option.opts[0], value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)


def _asked(llm: LLM, prompts: list[Prompt], chat: bool | None) -> tuple[list[Prompt], str]:
    """The prompts as the model is asked them, and a sentence about how."""
    template = llm.get_tokenizer().chat_template is not None
    if chat and not template:
        raise ConfigError("--chat is given, but the model has no chat template; leave it out")
    if chat is False or not template:
        why = "--no-chat was given" if template else "the model has no chat template"
        texts = [
            prompt
            if prompt.messages is None
            else replace(prompt, text="".join(f"{message['content']}\n" for message in prompt.messages), messages=None)
            for prompt in prompts
        ]
        return texts, f"Prompts are texts that the model continues: {why}."
    chats = [
        prompt if prompt.text is None else replace(prompt, text=None, messages=[{"role": "user", "content": prompt.text}])
        for prompt in prompts
    ]
    return chats, "Prompts go through the model's chat template."


def _constants(config: EntropixConfig) -> dict[str, float]:
    """Constants of a request under which it is drawn as by a server of this configuration."""
    return {name: value for name, value in config.numbers() if math.isfinite(value)}


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--engine isn't valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ConfigError(f"--engine should be a JSON object of LLM's arguments, not {text}")
    return arguments


def _start(console: Console, model: str, base: str, seed: int, arguments: dict[str, Any]) -> LLM:
    # Must be set before vLLM is imported.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # One process less to start; nothing else would happen in this one meanwhile.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # vLLM leaves a core to a server's frontend, which is half of a machine that has two; nothing is served here.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    with console.status(Text(f"Starting vLLM with {printable(Path(model).name)} ...")):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(f"vLLM can't be imported ({error}); install vllm-entropix[cuda] or vllm-entropix[cpu]") from None
        # Requests bring what is to be tried; regimes take only the logits' metrics.
        settings = {
            "preset": base,
            "experiments": {"constants": True},
            "attention": {"enabled": False},
            "trace": {"alternatives": 0},
            "prometheus": False,
        }
        import torch

        # Compiling a model takes longer than a few thousand tokens without it.
        ours: dict[str, Any] = {"seed": seed, "disable_log_stats": True, "enforce_eager": True}
        ours["additional_config"] = {"entropix": settings}
        if not torch.cuda.is_available():
            ours["kv_cache_memory_bytes"] = 1 << 30
            if not _has_bfloat16():
                ours["dtype"] = "float32"
        return LLM(model, **{**ours, **arguments})


def _has_bfloat16() -> bool:
    """Does the CPU multiply bfloat16? One that doesn't takes several times as long for it as for float32."""
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _measure(llm: LLM, prompts: list[Prompt], max_tokens: int, constants: Mapping[str, float], how: str) -> list[Measured]:
    """Run all prompts with these constants; entropies of the answers' tokens.

    Where answers are so short that a half of the prompts may have too few tokens, all are asked again.
    """
    from vllm import SamplingParams

    from vllm_entropix.observability.calibration import MIN_TOKENS, Measured

    tokenizer = llm.get_tokenizer()
    room = llm.model_config.max_model_len
    # The engine's seed, and none of its own: on a CPU vLLM can't cut a seeded request's prompt in pieces.
    ours = {"entropix_trace": "on", "entropix_base": "preset", "entropix_constants": dict(constants)}
    params = SamplingParams(max_tokens=max_tokens, extra_args=ours)
    asked = [prompt.token_ids(tokenizer) for prompt in prompts]
    for prompt, ids in zip(prompts, asked, strict=True):
        if len(ids) >= room:
            raise ConfigError(f"the prompt {prompt.name!r} has {len(ids)} tokens, but the model takes {room} with the answer")
    found = [Measured(np.empty(0), np.empty(0)) for _ in prompts]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(f"prompts, {how}", total=len(prompts))
        for turn in range(_ROUNDS):
            told = sum(map(len, found))
            if turn and not 0 < told < 4 * MIN_TOKENS:
                break
            progress.update(task, total=len(prompts) * (turn + 1))
            for number, part in _answers(llm, asked, params, f"{how}-{turn}"):
                found[number] = Measured.joined([found[number], part])
                progress.advance(task)
    return found


def _answers(llm: LLM, asked: list[list[int]], params: SamplingParams, name: str) -> Iterator[tuple[int, Measured]]:
    """What prompts, as ids of tokens, are answered: of each its place, and entropies of the tokens; as they end."""
    from vllm_entropix.observability.calibration import Measured

    engine = llm.llm_engine
    for number, ids in enumerate(asked):
        engine.add_request(f"{name}-{number}", {"prompt_token_ids": ids}, params)
    entropy, varentropy = (names().index(metric) for metric in ("entropy", "varentropy"))
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished:
                continue
            number = int(output.request_id.rpartition("-")[2])
            [trace] = traces(output)
            if trace is None:
                yield number, Measured(np.empty(0), np.empty(0))
                continue
            values = trace.values().astype(np.float64)
            finite = np.isfinite(values[:, [entropy, varentropy]]).all(1)
            yield number, Measured(values[finite, entropy], values[finite, varentropy])


def _show(console: Console, measured: Measured, base: EntropixConfig, found: Calibration) -> None:
    from vllm_entropix.observability.calibration import doubts

    console.print(_quantiles(measured))
    console.print()
    console.print(_plane(measured, found.config))
    console.print()
    console.print(_shares_table(found))
    console.print()
    console.print(_settings_table(base, found))
    for sentence in doubts(found):
        console.print(Text(f"• {sentence}", style="yellow"))


def _quantiles(measured: Measured) -> Table:
    table = Table(title=f"Next-token distributions of {len(measured)} tokens", title_justify="left", title_style="bold")
    table.add_column("share of tokens below")
    for quantile in _QUANTILES:
        table.add_column(f"{quantile:.0%}", justify="right")
    for name, values in (("entropy, bits", measured.entropy), ("varentropy, bits²", measured.varentropy)):
        table.add_row(name, *(f"{value:.3g}" for value in np.quantile(values, _QUANTILES)))
    return table


def _plane(measured: Measured, config: EntropixConfig) -> Text:
    """The tokens in the entropy × varentropy plane, on logarithmic axes: density as shade, regime as colour."""
    from vllm_entropix.observability.calibration import Measured, regimes_of

    def edges(values: np.ndarray, cells: int) -> np.ndarray:
        smallest = max(float(np.quantile(values, 0.02)), _SMALLEST)
        return np.geomspace(smallest, max(1.05 * float(values.max()), 10 * smallest), cells + 1)

    across, up = edges(measured.entropy, _COLUMNS), edges(measured.varentropy, _ROWS)
    counts, _, _ = np.histogram2d(
        np.maximum(measured.varentropy, up[0]), np.maximum(measured.entropy, across[0]), bins=(up, across)
    )
    centre_across, centre_up = np.sqrt(across[1:] * across[:-1]), np.sqrt(up[1:] * up[:-1])
    grid = Measured(np.tile(centre_across, _ROWS), np.repeat(centre_up, _COLUMNS))
    regimes = regimes_of(grid, config).reshape(_ROWS, _COLUMNS)
    shades = np.ceil(np.log1p(counts) / max(math.log1p(counts.max()), 1e-9) * (len(_SHADES) - 1)).astype(int)
    text = Text("Tokens by entropy (→) and varentropy (↑), logarithmic; colours are the proposed regimes\n", style="bold")
    kinds = list(Regime)
    for row in reversed(range(_ROWS)):
        label = f"{up[row + 1]:8.3g} " if (row - _ROWS + 1) % 4 == 0 or row == 0 else " " * 9
        text.append(f"{label}│", style="not bold dim")
        for column in range(_COLUMNS):
            shade, style = int(shades[row, column]), kinds[regimes[row, column]].style
            # An empty cell still tells whose it is.
            text.append(_SHADES[shade] if shade else "╌", style=f"not bold {style.split()[-1]}{'' if shade else ' dim'}")
        text.append("\n")
    ticks = "".join(f"{across[column]:<16.3g}" for column in range(0, _COLUMNS, 16))
    text.append(f"{' ' * 9}└{'─' * _COLUMNS}\n{' ' * 10}{ticks}\n{' ' * 10}", style="not bold dim")
    for regime in Regime:
        if regime is Regime.ADAPTIVE:
            text.append("\n" + " " * 10)
        text.append(f"{regime.name} ", style=f"not bold {regime.style.split()[-1]}")
        text.append(f"{regime.meaning}   ", style="not bold dim")
    return text


def _shares_table(found: Calibration) -> Table:
    fitting, checking = found.fitting, found.checking
    table = Table(title="Share of tokens by regime, under the proposal", title_justify="left", title_style="bold")
    table.add_column("regime")
    for header in (
        "asked for",
        f"fitting half\n{fitting.tokens} tokens",
        f"checking half\n{checking.tokens} tokens",
        "95 %",
        "at a clamp,\nfitting",
        "at a clamp,\nchecking",
    ):
        table.add_column(header, justify="right")
    for regime in Regime:
        check = checking.shares[regime.name]
        table.add_row(
            Text(regime.name, style=regime.style),
            f"{found.targets[regime.name]:.1%}",
            f"{fitting.shares[regime.name].value:.1%}",
            f"{check.value:.1%}",
            f"{check.low:.1%} to {check.high:.1%}",
            f"{fitting.clamped[regime.name]:.1%}",
            f"{checking.clamped[regime.name]:.1%}",
        )
    mean = checking.temperature
    table.add_section()
    table.add_row(
        Text("temperature"),
        "1.000",
        f"{fitting.temperature.value:.3f}",
        f"{mean.value:.3f}",
        f"{mean.low:.3f} to {mean.high:.3f}",
    )
    table.caption = "temperature: mean of the tokens that aren't argmax, relative to the base temperature; 1 over both halves"
    table.caption_justify = "left"
    return table


def _settings_table(base: EntropixConfig, found: Calibration) -> Table:
    """What of the base is replaced."""
    table = Table(title="Settings", title_justify="left", title_style="bold")
    table.add_column("setting")
    table.add_column(base.preset_name, justify="right")
    table.add_column("proposed", justify="right")
    after = dict(found.config.numbers())
    for name, value in base.numbers():
        if name.startswith("thresholds.") or value != after[name]:
            table.add_row(name, f"{value:g}", f"{after[name]:g}")
    return table
