"""Score answers by their uncertainty, from traces: the least certain ones first.

    vllm serve MODEL --sampler entropix --sampler-config '{"trace": {"path": "traces.jsonl", "default": true}}'
    python examples/score_answers.py traces.jsonl            # also .gz, saved HTTP responses, and - for standard input

Without a file it lets the shipped model answer some questions in this process, several times each, and scores these.
A score tells how unsure the model was of its words, not whether they are true: measure on your task before you rely on one.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_entropix.observability.overview import sequence_title
from vllm_entropix.observability.terminal import printable
from vllm_entropix.observability.tracefile import TraceFileError, read_traces
from vllm_entropix.records.line import TraceLine
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix.settings import as_mapping

QUESTIONS = ("What is 384 + 259?", "What has keys but opens no door?", "What is in the sealed box?")
SCORES = ("mean_entropy", "max_entropy", "unsure", "surprise")


def scores(line: TraceLine) -> dict[str, float]:
    """Scores of an answer; all of them grow with uncertainty.

    Returns:
        ``mean_entropy`` and ``max_entropy`` in bits; ``unsure``, the share of tokens outside LELV; ``surprise``, the mean
        surprisal in bits of the tokens whose probability is known, because they are among the recorded alternatives. Forced
        tokens don't count, the model didn't choose them. NaN where nothing was recorded.
    """
    records = [record for record in line.records if not record.forced]
    entropies = [record.entropy for record in records if record.entropy is not None]
    drawn = [dict(record.alternatives).get(record.token_id) for record in records]
    surprisals = [-math.log2(probability) for probability in drawn if probability]
    return {
        "mean_entropy": sum(entropies) / len(entropies) if entropies else math.nan,
        "max_entropy": max(entropies, default=math.nan),
        "unsure": sum(record.regime != "LELV" for record in records) / len(records) if records else math.nan,
        "surprise": sum(surprisals) / len(surprisals) if surprisals else math.nan,
    }


def answers_of_the_shipped_model(samples: int) -> Iterator[TraceLine]:
    """Answers to QUESTIONS, drawn in this process."""
    # vLLM reads these when it is imported.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
    from vllm import LLM, SamplingParams

    from vllm_entropix.demo_model import shipped_model

    settings = as_mapping(str(shipped_model() / "entropix.toml"))
    llm = LLM(
        str(shipped_model()),
        additional_config={"entropix": settings},
        max_model_len=1024,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
    )
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    # Without the clarification, which would make the model certain of its answers to the last two.
    extra = {"entropix_trace": "on", "entropix_clarification": "off"}
    outputs = llm.chat(messages, SamplingParams(n=samples, max_tokens=120, seed=0, extra_args=extra), use_tqdm=False)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        for completion in output.outputs:
            line = TraceLine.from_completion(
                request_id=output.request_id,
                prompt_token_ids=output.prompt_token_ids,
                completion=completion,
                trace=completion.entropix_trace,
                sampler=registry.part(registry.load_server(settings)),
                tokenizer=llm.get_tokenizer(),
            )
            yield line.model_copy(update={"prompt": question})


def main() -> None:
    """Print one line per answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, help="files of traces (default: ask the shipped model)")
    parser.add_argument("--by", choices=SCORES, default="mean_entropy", help="score to sort by (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=4, help="answers per question of the shipped model (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args()
    try:
        lines: Iterable[TraceLine] = [line for path in options.traces for line in read_traces(path)]
        scored = [(scores(line), line) for line in (lines if options.traces else answers_of_the_shipped_model(options.samples))]
    except TraceFileError as error:
        sys.exit(str(error))
    # Those that can't be scored come last.
    scored.sort(key=lambda pair: -math.inf if math.isnan(pair[0][options.by]) else pair[0][options.by], reverse=True)
    if not options.json:
        print("  ".join(f"{name:>12}" for name in SCORES), " answer")
    for values, line in scored:
        answer = " ".join("".join(line.texts).split())
        if options.json:
            known = {name: None if math.isnan(value) else value for name, value in values.items()}
            print(json.dumps({"request_id": line.request_id, "index": line.index, "answer": answer, **known}))
        else:
            about = f"{sequence_title(line)} → {answer}" if line.prompt else answer
            print("  ".join(f"{values[name]:12.3f}" for name in SCORES), "", printable(about))


if __name__ == "__main__":
    main()
