"""Run in a process of its own: what the engine of one part answers, as JSON.

Arguments: the part's name, the folder of the random model, the file to write.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.same_tokens.parts import ALONE, PARTS, Part, Values

ROOT = Path(__file__).resolve().parents[2]
DRAFT = ROOT / "tests" / "data" / "draft_model"
ENGINE: Values = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 16,
    "block_size": 32,
    "seed": 0,
    "disable_log_stats": True,
}


def exact(value: Any) -> Any:
    """A JSON value without rounding: floats as hexadecimal text, the rest as it is."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    return value


def trace_of(completion: Any) -> list[Values] | None:
    """A completion's records, fields by name; None if it isn't traced. The one place that knows how a trace is read."""
    trace = getattr(completion, "entropix_trace", None)
    if trace is None:
        return None
    return [{name: exact(value) for name, value in record.to_dict().items()} for record in trace]


def logprobs_of(positions: Any) -> Any:
    """Per position: [token, rank, log-probability], in vLLM's order."""
    if positions is None:
        return None
    return [None if at is None else [[token, one.rank, one.logprob.hex()] for token, one in at.items()] for at in positions]


def answer(output: Any) -> Values:
    """All that is compared of one request."""
    return {
        "prompt_logprobs": logprobs_of(output.prompt_logprobs),
        "completions": [
            {
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
                "logprobs": logprobs_of(completion.logprobs),
                "trace": trace_of(completion),
            }
            for completion in output.outputs
        ],
    }


def shipped_model() -> str:
    """Folder of the shipped model, as users are told to find it."""
    command = [sys.executable, "-P", "-m", "vllm_entropix", "demo", "--print-model-path"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def start(part: Part, random_model: str) -> Any:
    """The part's engine."""
    from vllm import LLM

    arguments = {**ENGINE, **part.engine}
    if arguments.get("speculative_config", {}).get("model") == "DRAFT":
        arguments["speculative_config"] = {**arguments["speculative_config"], "model": str(DRAFT)}
        from triton import language
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import tldevice

        # The one function of CUDA's library in these kernels, which Triton's interpreter hasn't.
        tldevice.log1p = lambda x: language.log(1.0 + x)
    model = shipped_model() if part.model == "shipped" else random_model
    return LLM(model, additional_config={"entropix": part.settings}, **arguments)


def generate(llm: Any, part: Part) -> dict[str, Values]:
    """The answer to each request, by name. Those that may share a batch are one."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    tokenizer = llm.get_tokenizer()
    prompts, asked = {}, {}
    for name, prompt, parameters in part.asked():
        if isinstance(prompt, dict):
            messages = [{"role": "user", "content": prompt["chat"]}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        regex = parameters.pop("regex", None)
        if regex is not None:
            parameters["structured_outputs"] = StructuredOutputsParams(regex=regex)
        prompts[name], asked[name] = prompt, SamplingParams(**parameters)
    alone = [name for name in asked if name.split(" ", 1)[1] in ALONE]
    together = [name for name in asked if name not in alone]
    found: dict[str, Values] = {}
    for names in (together, *([name] for name in alone)):
        outputs = llm.generate([prompts[name] for name in names], [asked[name] for name in names], use_tqdm=False)
        found.update(zip(names, map(answer, outputs), strict=True))
    return {name: found[name] for name in asked}


def main() -> None:
    """Write the answers of one part."""
    name, random_model, file = sys.argv[1:]
    llm = start(PARTS[name], random_model)
    Path(file).write_text(json.dumps(generate(llm, PARTS[name])), encoding="utf-8")
    # Workers end with their engine.
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
