"""Keep an engine in a Ray actor and get traced outputs from it: a trace travels with its output.

    pip install ray
    python examples/ray_actor.py "Once upon a time" "What has keys but opens no door?"

Starts a Ray of its own on this machine, with the shipped model on the CPU; with --gpus 1 the actor takes a GPU.
"""

import argparse
import os
from collections import Counter
from typing import Any

import ray

from vllm_entropix.demo_model import shipped_model
from vllm_entropix.records.trace import traces


class Engine:
    """An engine with entropix, in a process of Ray's."""

    def __init__(self, model: str, sampler_config: str | None, **arguments: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the actor is a process already

        from vllm import LLM

        import vllm_entropix  # noqa: F401  (for the keywords sampler and sampler_config)

        settings = {"sampler_config": sampler_config} if sampler_config else {}
        self._llm = LLM(model, sampler="entropix", **settings, **arguments)

    def generate(self, prompts: list[str], max_tokens: int) -> list[Any]:
        """vLLM's own outputs, each with its trace."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=max_tokens, seed=0, extra_args={"entropix_trace": "on"})
        return self._llm.generate(prompts, parameters, use_tqdm=False)


def main() -> None:
    """Generate in the actor, read traces here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=["Once upon a time", "Long ago, a patient goose"], metavar="prompt")
    parser.add_argument("--model", help="any that vLLM can load (default: the shipped one)")
    parser.add_argument("--max-tokens", type=int, default=60)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of the actor (default: none)")
    options = parser.parse_args()
    arguments: dict[str, Any] = {"max_model_len": 1024, "enforce_eager": True}
    if not options.gpus:
        arguments["kv_cache_memory_bytes"] = 1 << 28
    model, settings = options.model, None
    if model is None:
        model, settings = str(shipped_model()), str(shipped_model() / "entropix.toml")

    ray.init(num_cpus=1, num_gpus=options.gpus, include_dashboard=False, log_to_driver=False)
    try:
        engine = ray.remote(num_cpus=1, num_gpus=options.gpus)(Engine).remote(model, settings, **arguments)
        for output in ray.get(engine.generate.remote(options.prompts, options.max_tokens)):
            [trace] = traces(output)
            if trace is None:
                raise SystemExit("the output came without its trace")
            regimes = Counter(record.regime for record in trace)
            print(f"{output.prompt!r} → {output.outputs[0].text!r}")
            print("  " + ", ".join(f"{regime} {count}" for regime, count in regimes.most_common()))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
