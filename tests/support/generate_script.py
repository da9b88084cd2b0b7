"""Run in a process of its own: generates with fixed seeds and prints tokens and traces as JSON in the last line.

Arguments: model, JSON of LLM's arguments, JSON of a list of [prompt, sampling parameters].
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    model, arguments, requests = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    if "sampler" in arguments:
        import vllm_entropix  # noqa: F401  (for the keywords)
    llm = LLM(
        model,
        **{"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20, **arguments},
    )
    outputs = llm.generate(
        [prompt for prompt, _ in requests], [SamplingParams(**params) for _, params in requests], use_tqdm=False
    )
    results = []
    for output in outputs:
        for completion in output.outputs:
            trace = getattr(completion, "entropix_trace", None)
            records = None if trace is None else [record.to_dict() for record in trace]
            results.append({"token_ids": list(completion.token_ids), "text": completion.text, "trace": records})
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
