"""Run in a process of its own: which of the CPU's kernels are compiled when an engine has started, and when it has generated.

Argument: model. Prints, for both moments, each kernel's number of compiled signatures, as JSON in the last line.
"""

import importlib
import json
import pkgutil
import sys
import time
from typing import Any


def compiled() -> dict[str, int]:
    from numba.core.registry import CPUDispatcher

    from vllm_entropix.kernels import numba_ as cpu

    names = [module.name for module in pkgutil.iter_modules(cpu.__path__, f"{cpu.__name__}.")]
    names.append("vllm_entropix.samplers.entropix.numba_rule")
    kernels = (kernel for name in names for kernel in vars(importlib.import_module(name)).values())
    return {kernel.__name__: len(kernel.signatures) for kernel in kernels if isinstance(kernel, CPUDispatcher)}


def draw_by_chain(llm: Any) -> list[int]:
    from vllm import SamplingParams

    said = {"samplers": "dry;xtc;min_p;temperature", "dry_multiplier": 0.8, "xtc_probability": 0.5}
    [output] = llm.generate(["Again and again"], SamplingParams(max_tokens=8, seed=1, extra_args=said), use_tqdm=False)
    return list(output.outputs[0].token_ids)


def main() -> None:
    from vllm import LLM, SamplingParams

    import vllm_entropix  # noqa: F401  (for the keywords)

    llm = LLM(
        sys.argv[1],
        sampler="entropix",
        sampler_config={"attention": {"layers": "all"}},
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
    )
    started = compiled()
    params = [SamplingParams(max_tokens=8, extra_args={"entropix_trace": trace}) for trace in ("on", "off", "on")]
    llm.generate(["One", "Two words", "And this is the third"], params, use_tqdm=False)
    llm.generate(["Alone"], SamplingParams(max_tokens=8, top_k=20), use_tqdm=False)
    served = compiled()
    chains = {"meanwhile": draw_by_chain(llm)}
    kernel = llm.llm_engine.model_executor.driver_worker.worker._entropix.batch.samplers["chain"]
    while not kernel._has_kernel():
        time.sleep(0.1)
    chains["compiled"], chains["drawn"], chains["called"] = compiled(), draw_by_chain(llm), compiled()
    print("RESULT " + json.dumps({"started": started, "served": served, "chains": chains}))


if __name__ == "__main__":
    main()
