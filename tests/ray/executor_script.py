"""vLLM's Ray executor with two workers; then with workers that don't have the plugin."""

import json
import os
import sys


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
    print("RESULT " + json.dumps({"outputs": found, "refused": refused}))


if __name__ == "__main__":
    main()
