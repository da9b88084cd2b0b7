"""``vllm-entropix demo``: a model, shipped or any, in a real engine: entropix, greedy, plain and a chain in one batch."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from vllm_entropix._version import __version__
from vllm_entropix.cli.checks import require_model
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.observability.report import Source, write_report
from vllm_entropix.observability.terminal import TracedText, coloured, legend, printable, summary_table, tree_of
from vllm_entropix.records.line import TraceLine
from vllm_entropix.records.schema import TokenEntry
from vllm_entropix.records.tokens import token_texts
from vllm_entropix.records.trace import TokenRecord, traces
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET, EntropixConfig, as_mapping
from vllm_entropix.settings.errors import ConfigError

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

# Where the prompts are that any model but the shipped one is asked.
_HERE = Path(__file__).parent
MODES = ("entropix", "greedy", "plain")
# Of prompts that name a chain, or how to fork.
CHAIN, FORKS = "chain", "forks"


@dataclass(frozen=True)
class Prompt:
    """A prompt of the demo.

    Attributes:
        name: shown in the table.
        description: what there is to see.
        text: plain text to continue, or
        messages: a chat to answer.
        expected: the answer, where it can be checked; several with ``|`` between them, any of which will do.
        chain: a chain of samplers that continues it, too, and its settings, as ``vllm_xargs`` have them.
        forks: the same of an answer that forks.
    """

    name: str
    description: str = ""
    text: str | None = None
    messages: list[dict[str, str]] | None = None
    expected: str | None = None
    chain: dict[str, Any] | None = None
    forks: dict[str, Any] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """How its tokens are drawn: once in each of these."""
        more = {CHAIN: self.chain, FORKS: self.forks}
        return (*MODES, *(mode for mode, settings in more.items() if settings is not None))

    @property
    def shown(self) -> str:
        """The prompt as people read it."""
        if self.text is not None:
            return self.text
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.messages or [])

    def token_ids(self, tokenizer: Any) -> list[int]:
        """Of the text, or of the chat as the model's template writes it; a model without one continues what the user says."""
        if self.text is not None:
            return list(tokenizer.encode(self.text))
        assert self.messages is not None
        if tokenizer.chat_template is None:
            return list(tokenizer.encode("".join(f"{message['content']}\n" for message in self.messages)))
        chat = tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return list(chat)

    def is_right(self, text: str) -> bool:
        """Does a text have an expected answer, as whole words in either case?"""
        return (
            re.search(rf"(?<!\w)(?:{'|'.join(map(re.escape, (self.expected or '').split('|')))})(?!\w)", text, re.I) is not None
        )


def load_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSON file like the shipped ``prompts.json``, or one prompt per line of a text file.

    Raises:
        ConfigError: the file can't be read, or has no prompts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"can't read the prompts in {path}: not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"can't read the prompts in {path}: {error.strerror or error}") from None
    if path.suffix != ".json":
        prompts = [Prompt(f"line {number}", text=line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        try:
            data = json.loads(text)
            prompts = [
                Prompt(
                    entry["name"],
                    entry.get("description", ""),
                    entry.get("text"),
                    entry.get("messages"),
                    entry.get("expected_answer"),
                    entry.get("chain"),
                    entry.get("forks"),
                )
                for entry in data["prompts"]
            ]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} isn't a file of prompts: {type(error).__name__} {error}") from None
    if not prompts:
        raise ConfigError(f"{path} has no prompts")
    return prompts


def _selected(prompts: list[Prompt], names: list[str]) -> list[Prompt]:
    unknown = sorted(set(names) - {prompt.name for prompt in prompts})
    if unknown:
        raise ConfigError(f"there is no prompt {unknown[0]!r}; there are {', '.join(prompt.name for prompt in prompts)}")
    return [prompt for prompt in prompts if prompt.name in names or not names]


def demo(
    model: Annotated[str | None, typer.Option(help="Any model that vLLM can load; default: the one that is shipped.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a prompt per line, or JSON like the shipped one.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only the prompt of this name; may be given several times.")] = None,
    sampler_config: Annotated[
        str | None, typer.Option(help="Preset, JSON, or a .json, .toml or .yaml file; default: the shipped model's own.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer at most.")] = 160,
    seed: Annotated[int, typer.Option(help="Seed of every draw.")] = 0,
    svg: Annotated[Path | None, typer.Option(help="Also write what is shown as an SVG picture.")] = None,
    report: Annotated[Path, typer.Option(help="Where to write the report, an HTML file.")] = Path("entropix-demo.html"),
    print_model_path: Annotated[
        bool, typer.Option("--print-model-path", help="Print where the shipped model lies, and end.")
    ] = False,
) -> None:
    """Watch a real engine decide, token by token, between argmax, exploring, resampling, adapting and asking."""
    if print_model_path:
        typer.echo(shipped_model())
        return
    chosen = _selected(load_prompts(prompts or (shipped_model() if model is None else _HERE) / "prompts.json"), only or [])
    if sampler_config is None and model is None:
        sampler_config = str(shipped_model() / "entropix.toml")
    # Without a preset the engine would run with a calibration that this program doesn't show.
    settings = as_mapping(sampler_config or DEFAULT_PRESET)
    config = registry.load_server(settings)
    console = Console(record=svg is not None, width=130 if svg is not None else None)
    path = model or str(shipped_model())
    require_model(path)
    llm = _start(console, path, settings, max_tokens)
    outputs = _run(console, llm, chosen, config, max_tokens, seed)
    _show(console, llm, chosen, outputs, config, model)
    if svg is not None:
        console.save_svg(str(svg), title="vllm-entropix demo")
        typer.echo(f"wrote {svg}")
    _report(report, llm, chosen, outputs, config, model)
    typer.echo(f"wrote {report}: open it in a browser, it needs no network")


def _start(console: Console, model: str, settings: dict[str, Any], max_tokens: int) -> LLM:
    # In this process and without compilation: a demo should start fast. Both must be set before vLLM is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm|torch")  # nothing a user of the demo can act on
    with console.status(Text(f"Starting vLLM with {printable(Path(model).name)} ...")):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(f"vLLM can't be imported ({error}); install vllm-entropix[cuda] or vllm-entropix[cpu]") from None

        arguments: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 64, "enforce_eager": True}
        if not _has_gpu():
            arguments["kv_cache_memory_bytes"] = 1 << 28
        return LLM(model, additional_config={"entropix": settings}, disable_log_stats=True, **arguments)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _parameters(mode: str, prompt: Prompt, config: EntropixConfig, max_tokens: int, seed: int) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if mode == "entropix":
        return SamplingParams(max_tokens=max_tokens, seed=seed, extra_args={"entropix_trace": "on"})
    if mode == FORKS:
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"entropix_trace": "on", **(prompt.forks or {})},
        )
    if mode == "greedy":
        return SamplingParams(max_tokens=max_tokens, temperature=0.0, extra_args={"entropix": "off"})
    base = config.base
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=base.temperature,
        top_p=base.top_p,
        top_k=base.top_k,
        min_p=base.min_p,
        extra_args=prompt.chain if mode == CHAIN else {"entropix": "off"},
    )


def _run(
    console: Console, llm: LLM, prompts: list[Prompt], config: EntropixConfig, max_tokens: int, seed: int
) -> dict[tuple[int, str], Any]:
    """All prompts in all modes as one batch; final outputs by (prompt, mode)."""
    tokenizer = llm.get_tokenizer()
    engine = llm.llm_engine
    wanted: dict[str, tuple[int, str]] = {}
    for index, prompt in enumerate(prompts):
        ids = prompt.token_ids(tokenizer)
        for mode in prompt.modes:
            request_id = f"{index}-{mode}"
            wanted[request_id] = (index, mode)
            asked = _parameters(mode, prompt, config, max_tokens, seed)
            engine.add_request(request_id, {"prompt_token_ids": ids}, asked)
    finished: dict[tuple[int, str], Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        modes = dict.fromkeys(mode for _, mode in wanted.values())
        task = progress.add_task(f"{len(prompts)} prompts by {', '.join(modes)}, in one batch", total=len(wanted))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[wanted[output.request_id]] = output
                    progress.advance(task)
    return finished


def _show(
    console: Console,
    llm: LLM,
    prompts: list[Prompt],
    outputs: dict[tuple[int, str], Any],
    config: EntropixConfig,
    model: str | None,
) -> None:
    tokenizer = llm.get_tokenizer()
    sequences = []
    for index, prompt in enumerate(prompts):
        completion = outputs[index, "entropix"].outputs[0]
        [trace] = traces(outputs[index, "entropix"])
        ends = set(tokenizer.all_special_ids)
        texts = ["" if token in ends else text for token, text in _pieces(tokenizer, completion.token_ids)]
        sequence = TracedText(prompt.name, texts, list(trace or ()))
        sequences.append(sequence)
        # What comes from a file or a model is printed as it stands: no markup, no control characters.
        parts: list[Any] = [Text(printable(prompt.shown), style="dim italic"), Text()]
        parts.append(Text("entropix  ", style="bold") + _verdict(prompt, completion.text) + _score(sequence.records))
        parts.append(Padding(coloured(sequence), (0, 0, 0, 2)))
        for mode in prompt.modes[1:]:
            text = outputs[index, mode].outputs[0].text
            parts.append(Text(f"{mode}  ", style="bold") + _verdict(prompt, text))
            if mode == CHAIN:
                parts[-1] += Text(printable(_written(prompt.chain or {})), style="dim")
            parts.append(Padding(Text(printable(text)), (0, 0, 0, 2)))
            if mode == FORKS:
                tree = outputs[index, mode].outputs[0].entropix_forks
                parts.append(Padding(tree_of(tree.branches, lambda token: tokenizer.decode([token])), (0, 0, 0, 2)))
        if prompt.description:
            parts += [Text(), Text(printable(prompt.description), style="dim")]
        console.print(Panel(Group(*parts), title=Text(printable(prompt.name), style="bold"), title_align="left"))
    console.print(legend())
    console.print()
    console.print(summary_table(sequences, console.width))
    name = "the shipped demo model" if model is None else printable(model)
    about = f"{name}; preset {config.preset_name}, {config.fidelity}; all {len(outputs)} sequences ran in one batch."
    console.print(Text(about, style="dim"))


def _report(
    path: Path,
    llm: LLM,
    prompts: list[Prompt],
    outputs: dict[tuple[int, str], Any],
    config: EntropixConfig,
    model: str | None,
) -> None:
    lines = []
    told = [
        (prompt, mode, outputs[index, mode])
        for index, prompt in enumerate(prompts)
        for mode in prompt.modes
        if mode in ("entropix", FORKS)
    ]
    for prompt, mode, output in told:
        [trace] = traces(output)
        if trace is not None:
            line = TraceLine.from_completion(
                request_id=prompt.name if mode != FORKS else f"{prompt.name}, forks",
                prompt_token_ids=output.prompt_token_ids,
                completion=output.outputs[0],
                trace=trace,
                sampler=registry.part(config),
                tokenizer=llm.get_tokenizer(),
                model=Path(model or shipped_model()).name,
            )
            line.prompt = llm.get_tokenizer().decode(output.prompt_token_ids)
            lines.append(line)
    write_report(path, [Source(f"vllm-entropix {__version__}, entropix sampling", lines)], "vllm-entropix demo")


def _pieces(tokenizer: Any, token_ids: Sequence[int]) -> Iterable[tuple[int, str]]:
    return zip(token_ids, token_texts(tokenizer, token_ids), strict=True)


def _score(records: Iterable[TokenRecord | TokenEntry]) -> Text:
    """How unsure the model was while it wrote: the mean entropy of the tokens that it chose."""
    entropies = [record.entropy for record in records if not record.forced and record.entropy is not None]
    return Text(f"  mean entropy {fmean(entropies):.2f} bits", style="dim") if entropies else Text()


def _written(chain: Mapping[str, Any]) -> str:
    settings = [f"{name} {value}" for name, value in chain.items() if name != "samplers"]
    return ", ".join((str(chain.get("samplers", "")), *settings))


def _verdict(prompt: Prompt, text: str) -> Text:
    if prompt.expected is None:
        return Text()
    right = prompt.is_right(text)
    return Text(f"✓ {prompt.expected}" if right else f"✗ not {prompt.expected}", style="green" if right else "red")
