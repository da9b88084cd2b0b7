"""Generates greedily with plain vLLM. As a program, run with a model, it prints the result as JSON in the last line."""

import json
import os
import sys


def greedy_tokens(model):
    """Tokens of two prompts, and the class of the model runner that made them."""
    from vllm import SamplingParams

    from tests.support.engine import engine, generate, worker_of

    llm = engine(model)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    outputs = generate(llm, ["The quick brown fox", "0123456789"], [params] * 2)
    runner = type(worker_of(llm).model_runner)
    return {
        "runner": f"{runner.__module__}.{runner.__qualname__}",
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


if __name__ == "__main__":
    # Only so can a process look at its runner; the rest of tests/conftest.py comes with the environment.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    print("RESULT " + json.dumps(greedy_tokens(sys.argv[1])))
