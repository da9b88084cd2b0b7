"""Offline batches with Ray Data LLM: prompts from JSONL or parquet in, texts and traces of entropix out.

::

    python deploy/ray/batch.py run prompts.jsonl results/ --model meta-llama/Llama-3.1-8B-Instruct --engines 4
    python deploy/ray/batch.py traces results/ -o traces.jsonl      # for `vllm-entropix report traces.jsonl`

A row has a unique ``id`` and either a ``prompt`` (text) or ``messages`` (a chat); ``sampling_params``, an object, is laid over
those of the command line. Stop it, or let it be killed, and start it again with the same output folder: Ray Data's checkpoints
leave out the rows that were written and drop files that weren't finished, so that no row is lost or there twice.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ray import cloudpickle
from ray.data import Dataset
from ray.data.checkpoint import CheckpointBackend, CheckpointConfig
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from vllm_entropix.demo_model import shipped_model

# Workers get the functions below with their definitions, so that no node but the driver's needs this file.
if __name__ != "__main__":
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

ID = "id"
TRACE = "entropix_trace"
CHECKPOINTS = ".checkpoints"

application = typer.Typer(add_completion=False, no_args_is_help=True, help="Offline batches with Ray Data LLM.")


class Format(StrEnum):
    """Schema of the files that are written."""

    jsonl = "jsonl"
    parquet = "parquet"


class Stage(vLLMEngineStageUDF):
    """Ray's stage around the engine, whose rows keep what Ray drops: why generation ended, and the trace."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._more: dict[int, dict[str, Any]] = {}
        generate = self.llm._generate_async

        async def generate_and_keep(request: Any) -> Any:
            output = await generate(request)
            self._more[request.request_id] = self._of_output(output, getattr(request.params, "extra_args", None))
            return output

        self.llm._generate_async = generate_and_keep

    def _of_output(self, output: Any, extra_args: Any) -> dict[str, Any]:
        from vllm_entropix.records.line import TraceLine
        from vllm_entropix.samplers import registry

        [completion] = output.outputs
        trace = getattr(completion, "entropix_trace", None)
        line = None
        if trace is not None:
            settings = self.engine_kwargs["additional_config"]["entropix"]
            line = TraceLine.from_completion(
                request_id=output.request_id,
                prompt_token_ids=output.prompt_token_ids,
                completion=completion,
                trace=trace,
                sampler=registry.part(registry.load_server(settings), extra_args),
                tokenizer=self.llm.engine.get_tokenizer(),
                model=self.model,
            ).model_dump_json()
        return {"finish_reason": completion.finish_reason, TRACE: line}

    async def _generate_with_error_handling(self, row: dict[str, Any], batch_uuid: Any) -> dict[str, Any]:
        result = await super()._generate_with_error_handling(row, batch_uuid)
        return {**result, **self._more.pop(result["request_id"], {"finish_reason": None, TRACE: None})}


def _read(path: str) -> Dataset:
    read = ray.data.read_parquet if path.endswith(".parquet") else ray.data.read_json
    try:
        rows = read(path)
        columns = rows.columns() or []
    except FileNotFoundError:
        raise typer.BadParameter(f"{path} isn't there") from None
    if ID not in columns:
        raise typer.BadParameter(f"the rows of {path} have no column {ID}, by which a resumed run knows what is done")
    if not {"prompt", "messages"} & set(columns):
        raise typer.BadParameter(f"the rows of {path} have neither a column prompt nor a column messages")
    return rows


def _object(option: str, text: str) -> dict[str, Any]:
    """An option's JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option} isn't JSON: {error}: {text[:100]}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{option} has to be an object, as in {{...}}: {text[:100]}")
    return found


def _folder(output: Path) -> Path:
    """The folder of results, if Ray takes its name for what it is."""
    name = str(output)
    if ":/" in name:
        raise typer.BadParameter(f"results are written to a folder that all nodes see, not to a URL: {name[:100]}")
    if not name.isprintable():
        raise typer.BadParameter(f"Ray leaves line breaks and tabs out of a folder's name: {name[:100]!r}")
    return output.absolute()


@application.command()
def run(
    prompts: Annotated[str, typer.Argument(help="JSONL or parquet file, folder or URL.")],
    output: Annotated[Path, typer.Argument(help="Folder for results; one that all nodes see. Resumes what is there.")],
    model: Annotated[str, typer.Option(help="Folder or Hugging Face name.")] = str(shipped_model()),
    sampler_config: Annotated[str, typer.Option(help="Settings as JSON, a preset's name or a file.")] = "{}",
    sampling_params: Annotated[str, typer.Option(help="vLLM's SamplingParams as JSON.")] = '{"max_tokens": 256}',
    engine_kwargs: Annotated[str, typer.Option(help="Further arguments of vLLM's engine as JSON.")] = "{}",
    traces: Annotated[bool, typer.Option(help="Write a trace with each row.")] = True,
    engines: Annotated[int, typer.Option(min=1, help="Engines that run side by side.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs of an engine.")] = 1,
    part_rows: Annotated[int, typer.Option(min=1, help="Rows that are written, and repeated after a stop, together.")] = 256,
    write: Annotated[Format, typer.Option("--format", help="Of the results.")] = Format.jsonl,
    cpu: Annotated[bool, typer.Option(help="Engines on CPUs.")] = False,
) -> None:
    """Generate for all rows that have no result yet."""
    from vllm_entropix.samplers import registry
    from vllm_entropix.samplers.entropix.settings import as_mapping
    from vllm_entropix.settings.errors import ConfigError

    try:
        settings = dict(as_mapping(sampler_config))
        registry.load_server(settings)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    base, more = _object("--sampling-params", sampling_params), _object("--engine-kwargs", engine_kwargs)
    output = _folder(output)
    _join_or_start(cpus=engines * tensor_parallel_size + 3)
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id_column=ID,
        checkpoint_path=str(output / CHECKPOINTS),
        override_backend=CheckpointBackend.FILE_STORAGE,
        delete_checkpoint_on_success=False,
    )
    rows = _read(prompts)
    chat = "prompt" not in (rows.columns() or [])

    def request(row: dict[str, Any]) -> dict[str, Any]:
        own = row.get("sampling_params") or {}
        params = {**base, **{name: value for name, value in own.items() if value is not None}}
        if traces:
            params["extra_args"] = {"entropix_trace": "on", **(params.get("extra_args") or {})}
        return {"sampling_params": params}

    def result(row: dict[str, Any]) -> dict[str, Any]:
        kept = {name: row[name] for name in (ID, "prompt", "messages") if name in row}
        return {**kept, "text": row["generated_text"], "finish_reason": row["finish_reason"], TRACE: row[TRACE]}

    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs={
                "tensor_parallel_size": tensor_parallel_size,
                # On a CPU vLLM would claim nearly all memory for each engine.
                **({"kv_cache_memory_bytes": 1 << 28} if cpu else {}),
                **more,
                # Ray refuses arguments of the engine that it doesn't know, `sampler` among them.
                "additional_config": {**more.get("additional_config", {}), "entropix": settings or True},
            },
            batch_size=part_rows,
            concurrency=engines,
            chat_template_stage=chat,
            # vLLM does both itself, without a process more for each.
            tokenize_stage=False,
            detokenize_stage=False,
            **({"placement_group_config": {"bundle_per_worker": {"CPU": 1}}} if cpu else {}),
        ),
        preprocess=request,
        postprocess=result,
    )
    # A copy: assigning to the stage runs its validators a second time, and they take the placement group's settings out.
    name = "vLLMEngineStage"
    processor.stages[name] = processor.get_stage_by_name(name).model_copy(update={"fn": Stage})
    results = processor(rows.repartition(target_num_rows_per_block=part_rows))
    output.mkdir(parents=True, exist_ok=True)
    # Ray shows the rows done and to do of each stage while it writes.
    (results.write_json if write is Format.jsonl else results.write_parquet)(str(output))
    typer.echo(f"{sum(1 for _ in read_results(output))} rows are in {output}")


def _join_or_start(cpus: int) -> None:
    """Join the running cluster, or start one here that counts at least ``cpus`` CPUs.

    Reading, leaving out what is done, the steps around the engine and the engine hold one each. If they have to wait for one
    another, which two cores would make them do, nothing ever moves.
    """
    try:
        ray.init(address="auto", ignore_reinit_error=True)
    except ConnectionError:
        ray.init(num_cpus=max(cpus, os.cpu_count() or 1))


def finished_files(folder: Path) -> list[Path]:
    """The files of results that a run has finished; those it left behind half written are done again when it is resumed.

    Ray writes a part's ids into a pending checkpoint first, then the part's file, whose name begins as the checkpoint's does,
    and then commits the checkpoint by renaming it (``ray/data/checkpoint/checkpoint_writer.py:195-271``, Ray 2.60).
    """
    # In this order: what begins while this runs is either not listed or known to be pending.
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".parquet"))
    suffix = ".pending.parquet"
    pending = tuple(file.name.removesuffix(suffix) for file in (folder / CHECKPOINTS).glob(f"*{suffix}"))
    return [file for file in files if not file.name.startswith(pending)]


def read_results(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows that a run has finished."""
    import pyarrow.parquet

    for file in finished_files(folder):
        if file.suffix == ".json":
            yield from (json.loads(line) for line in file.open())
        else:
            yield from pyarrow.parquet.read_table(file).to_pylist()


@application.command()
def traces(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Results of a run.")],
    output: Annotated[Path, typer.Option("-o", help="File of traces to write.")] = Path("traces.jsonl"),
) -> None:
    """Gather the traces of a run's rows in one file, for `vllm-entropix report` and `whatif`."""
    number = 0
    with output.open("w") as file:
        for row in read_results(folder):
            if row[TRACE] is not None:
                file.write(row[TRACE] + "\n")
                number += 1
    typer.echo(f"{number} traces are in {output}")


if __name__ == "__main__":
    application()
