"""vLLM's Ray executor with two workers, one of which is killed; then with workers that don't have the plugin."""

import json
import os
import sys
import time
from typing import Any

import psutil

ENDED_SECONDS = 60


def process_id(worker: Any) -> int:
    """Sent to each worker."""
    return os.getpid()


def while_killing(llm: Any, prompt: str, params: Any) -> dict[str, Any]:
    """Generate, and after some steps kill the second worker: how the generation ended, and who of the workers lives on."""
    workers = [psutil.Process(pid) for pid in llm.collective_rpc(process_id)]
    engine = llm.llm_engine
    engine.add_request("interrupted", prompt, params)
    for _ in range(5):
        engine.step()
    workers[1].kill()
    killed, error = time.monotonic(), None
    try:
        while engine.has_unfinished_requests():
            engine.step()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.monotonic() - killed
    _, alive = psutil.wait_procs(workers, ENDED_SECONDS)
    return {"error": error, "seconds": seconds, "alive": len(alive)}


def main() -> None:
    model, arguments, requests = (json.loads(argument) for argument in sys.argv[1:])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import ray
    from vllm import LLM, SamplingParams

    from tests.support.engine import close_engine, engine

    # The GPUs stand for places of workers.
    ray.init(num_cpus=4, num_gpus=4, include_dashboard=False, _node_ip_address="127.0.0.1")
    llm = engine(model, **arguments, tensor_parallel_size=2, distributed_executor_backend="ray")
    outputs = llm.generate(
        [prompt for prompt, _ in requests], [SamplingParams(**params) for _, params in requests], use_tqdm=False
    )
    found = []
    for output in outputs:
        trace = getattr(output.outputs[0], "entropix_trace", None)
        records = None if trace is None else [record.to_dict() for record in trace]
        found.append([list(output.outputs[0].token_ids), records])
    traced = SamplingParams(max_tokens=480, ignore_eos=True, seed=3, extra_args={"entropix_trace": "on"})
    killed = while_killing(llm, "a", traced)
    close_engine()

    os.environ["ENTROPIX_TEST_RAY_WITHOUT_PLUGIN"] = "1"
    try:
        LLM(
            model,
            max_model_len=512,
            enforce_eager=True,
            tensor_parallel_size=2,
            distributed_executor_backend="ray",
            additional_config={"entropix": True},
        )
        refused = None
    except Exception as error:
        refused = str(error)
    print("RESULT " + json.dumps({"outputs": found, "killed": killed, "refused": refused}))


if __name__ == "__main__":
    main()
